"""The files of a dataset, in a directory or on the Hugging Face hub, and the rows of each, whatever kind they are.

`find_shards` lists the files. `Shard.rows` reads one; `read_objects` reads the rows of a file as JSON objects.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from quietstar.config.options import path_kind, path_text
from quietstar.data.kinds import READ, kind_ending, kind_of, read_rows
from quietstar.data.rows import TRAINING, BadRow, Row, object_of
from quietstar.errors import ConfigError, DataError, QuietStarError

DESCRIPTIONS = re.compile(
    r"(readme|licen[cs]e|notice|copying|changelog|citation)(\W.*)?|(dataset_infos?|dataset_dict|state|config|metadata)\.json",
    re.IGNORECASE,
)
"""Names of the files of a directory that describe its data."""

PATTERNS = {"openwebmath": "data/train-*.parquet", "c4": "en/c4-train.*.json.gz", "stream": "**/*", "files": "**/*"}
"""Pattern of the files that a source reads, below the path of the dataset."""

HUB_RETRIES = 8
"""Successive attempts to open a hub file again before the run stops: about eight minutes in all."""

_OTHER_SPLIT = re.compile(r"(?<![a-z])(test|valid|validation|dev|eval)(?![a-z])", re.IGNORECASE)


MOST_ROW = 1 << 30
"""Most bytes of a row where no option says it."""


@dataclass(frozen=True)
class Shard:
    """One file of a dataset.

    Args:
        path: Path of the file in messages.
        name: Path of the file below that of the dataset, with `/`.
        size: Size of the file in bytes.
        open: Function that opens the file for reading bytes.
        retries: Number of successive attempts to open the file again after a failure.
    """

    path: str
    name: str
    size: int
    open: Callable[[], BinaryIO]
    retries: int = 0

    def rows(self, start: int, field: str | None, limit: int, option: str = TRAINING.field) -> Iterator[Row]:
        """Yields the rows of the file from row `start` on; rows before it are not parsed.

        Args:
            start: First row to yield, counted from 0.
            field: Field or column that is wanted; of a parquet file only this one is read, with None all.
            limit: Most bytes of a row; longer rows come without content.
            option: Option that names the field, for messages.

        Raises:
            ConfigError: A library that the file needs is not installed.
            DataError: The file, rather than a row of it, is damaged, cannot be read, or is of another kind.
        """
        failures = 0
        while True:
            try:
                with self.open() as file:
                    for row in read_rows(file, self.path, self.name, start, field, limit, option):
                        yield row
                        start, failures = row.index + 1, 0
                return
            except QuietStarError:
                raise
            except Exception as error:  # the kinds of two network clients, zlib and pyarrow have no base in common
                failures += 1
                if failures > self.retries:
                    reason = " ".join(str(error).split())[:300] or type(error).__name__
                    raise DataError(f"{self.path}: cannot be read from row {start + 1} on: {reason}") from error
                time.sleep(min(2**failures, 120))


def local_file(path: str | os.PathLike[str], option: str = "") -> Shard:
    """Returns a file of this machine; one that is no regular file, such as a pipe, is read by its content.

    Args:
        path: File to read.
        option: Option that names the path, for the message.

    Raises:
        ConfigError, DataError: The file cannot be read, with an option and without one.
    """
    place = Path(path)
    try:
        regular = not stat.S_ISFIFO(place.stat().st_mode) and not place.is_char_device()
        if regular:
            place.open("rb").close()
    except (OSError, ValueError) as error:  # ValueError: a character that no path can have
        reason = error.strerror if isinstance(error, OSError) else error
        if option:
            raise ConfigError(f"{option}: cannot read {path_text(place)} ({reason})") from None
        raise DataError(f"{path_text(place)}: cannot be read: {reason}") from None
    return Shard(str(place), place.name if regular else "pipe", 0, partial(cast(Any, open), place, "rb"))


def read_objects(
    path: str | os.PathLike[str], needed: str, *, option: str = "", number: Callable[[str], Any] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of a file as JSON objects, each with its place; blank lines are left out.

    Args:
        path: File to read, of any kind with rows.
        needed: What an object must have, for the message.
        option: Option that names the path, for messages.
        number: Function that makes a value of the text of a number; None makes int and float.

    Raises:
        ConfigError: A library that the file needs is not installed.
        DataError: The file cannot be read, or a row is not an object; the message names its place.
    """
    for row in local_file(path, option).rows(0, None, MOST_ROW):
        try:
            record = object_of(row, needed, number)
        except BadRow as error:
            raise DataError(f"{row.place}: {error}") from None
        if record is not None:
            yield row.place, record


def find_shards(
    path: str, pattern: str | None, source: str = "stream", option: str = "data.path", *, quiet: bool = False
) -> list[Shard]:
    """Lists the shards of a dataset in the order of their names.

    Args:
        path: Directory or file; or, where there is none of that name, a hub dataset as `owner/name`, which `@revision`
            and a place in the dataset may follow (`allenai/c4@main/en`). The path may end in a pattern.
        pattern: Pattern of the files below `path`; None takes the usual one of the source.
        source: Kind of the dataset: `openwebmath`, `c4`, `stream`, or `files`, which is never on the hub.
        option: Option that names the path, for messages.
        quiet: Whether to say nothing on standard error of files that are left out.

    Raises:
        ConfigError: No pattern is given, and there are shards of several splits.
        DataError: There is no such directory, hub dataset or shard.
    """
    if "*" in path:
        parts = PurePosixPath(path).parts
        first = next(place for place, part in enumerate(parts) if "*" in part)
        path, pattern = str(PurePosixPath(*parts[:first])), "/".join(parts[first:])
    wanted = pattern or PATTERNS[source]
    odd: list[str] = []
    try:
        local = _local(path, wanted, pattern is None, option)
    except (OSError, ValueError) as error:
        if isinstance(error, QuietStarError):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{option}: {path[:200]!r} cannot be read: {reason}") from None
    if isinstance(local, Shard):
        return [local]
    if local is not None:
        found, odd = local
    elif source == "files" or is_local(path):
        raise DataError(f"{option}: {path if path.isprintable() else repr(path)}: no such file or directory")
    else:
        found = _hub_shards(path, wanted)
    everything = wanted == PATTERNS["stream"]
    chosen, left_out = _chosen(found, everything)
    left_out += odd
    if not chosen:
        told = f" ({_counted(left_out)} left out)" if left_out else ""
        raise DataError(
            f"{option}: {path}: no file that can be read matches {wanted!r}{told}; needs {READ}, and "
            f"{_pattern_option(option)} names those to read"
        )
    if everything:
        _check_one_split(path, chosen, option)
    if left_out and not quiet:
        print(f"{path}: read {len(chosen)} file(s), left out {_counted(left_out)}", file=sys.stderr)
    return sorted(chosen, key=lambda shard: shard.name)


def _local(path: str, wanted: str, usual: bool, option: str) -> Shard | tuple[list[Shard], list[str]] | None:
    """Returns the file of a path, or what a directory has of a pattern; None where there is neither."""
    place = Path(path)
    if place.is_dir():
        found, odd = _local_shards(place, wanted)
        if not found and usual:  # a copy of some shards rather than of the dataset
            found, odd = _local_shards(place, wanted.rpartition("/")[2])
        return found, odd
    if not place.exists():
        return None
    if place.is_file() and kind_of(place.name)[0] is None and kind_ending(place.name):
        raise DataError(f"{option}: {path}: is of no known kind; needs a name that ends in {READ}")
    return _local_shard(place, place.parent) if place.is_file() else local_file(place)


def _chosen(found: Iterable[Shard], everything: bool) -> tuple[list[Shard], list[str]]:
    """Returns the files that are read, and a word for each that is left out: its name or kind."""
    chosen, left_out = [], []
    for shard in found:
        parts = PurePosixPath(shard.name).parts
        if any(part.startswith(".") for part in parts):
            left_out.append("hidden")
        elif everything and DESCRIPTIONS.fullmatch(parts[-1]):
            left_out.append(parts[-1])
        elif kind_of(shard.name)[0] is None:
            left_out.append(PurePosixPath(shard.name).suffix or "without an ending")
        else:
            chosen.append(shard)
    return chosen, left_out


def _counted(left_out: Iterable[str]) -> str:
    counts = Counter(left_out).most_common()
    more = sum(count for _, count in counts[10:])
    return ", ".join(f"{count} {word}" for word, count in counts[:10]) + (f", {more} of other kinds" if more else "")


def is_local(path: str) -> bool:
    """Returns whether a path is on this machine and not looked for on the hub."""
    return path.startswith((".", "~", os.sep)) or path_kind(path, "data.path") is not None


def _pattern_option(option: str) -> str:
    """Returns the option that says which files of a directory are read; the path itself may end in a pattern."""
    return "data.shards" if option == TRAINING.path else f"a pattern at the end of {option}"


def _check_one_split(path: str, shards: list[Shard], option: str) -> None:
    others = [shard.name for shard in shards if _OTHER_SPLIT.search(shard.name)]
    if 0 < len(others) < len(shards):
        missing = "data.shards: missing; " if option == TRAINING.path else f"{option}: "
        raise ConfigError(
            f"{missing}{path} has shards that look like another split ({others[0]}). "
            "Name those to read, such as '**/train*'; a path may also end in a pattern"
        )


def _local_shards(directory: Path, pattern: str) -> tuple[list[Shard], list[str]]:
    """Returns the files of a pattern, and a word for each entry that is neither a file nor a directory of its own."""
    found, odd = [], []
    for entry in directory.glob(pattern):
        if entry.is_file():
            found.append(_local_shard(entry, directory))
        elif entry.is_dir() and not os.access(entry, os.R_OK | os.X_OK):  # glob passes over its files silently
            raise DataError(f"{entry}: cannot be read: {os.strerror(errno.EACCES)}")
        elif entry.is_symlink():
            odd.append("link to a directory" if entry.is_dir() else "broken link")
        elif not entry.is_dir():
            odd.append("special file")
    return found, odd


def _local_shard(file: Path, directory: Path) -> Shard:
    name = file.relative_to(directory).as_posix()
    return Shard(str(file), name, file.stat().st_size, partial(cast(Any, open), file, "rb"))


def _hub_shards(path: str, pattern: str) -> list[Shard]:
    from huggingface_hub import HfFileSystem  # half a second that other sources need not wait for

    root = f"datasets/{path}"
    if kind_of(path)[0] is not None:
        root, _, pattern = root.rpartition("/")
    try:
        return list_shards(HfFileSystem(), f"{root}/{pattern}", root)
    except Exception as error:  # of huggingface_hub and its network client
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"data.path: {path}: no such directory; as a dataset of the hub it cannot be listed: {reason}"
        ) from error


def list_shards(filesystem: Any, pattern: str, root: str) -> list[Shard]:
    """Lists the files of a remote file system that match a pattern.

    Args:
        filesystem: File system with the interface of fsspec, such as the hub's.
        pattern: Path of the files, with wildcards.
        root: Path of the dataset; the names of the shards are relative to it.
    """
    described = filesystem.glob(pattern, detail=True)
    return [
        Shard(path, path.removeprefix(f"{root}/"), entry["size"], partial(filesystem.open, path, "rb"), HUB_RETRIES)
        for path, entry in described.items()
        if entry["type"] == "file"
    ]
