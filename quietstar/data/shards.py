"""The files of a streamed dataset, in a directory or on the Hugging Face hub, and the rows of each.

`find_shards` lists the files. `Shard.rows` reads one: JSON lines, plain or gzipped, or a column of a parquet file.
"""

from __future__ import annotations

import gzip
import importlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import numpy as np

from quietstar.data.rows import Row, read_json_rows, too_long
from quietstar.errors import ConfigError, DataError, QuietStarError

PATTERNS = {"openwebmath": "data/train-*.parquet", "c4": "en/c4-train.*.json.gz", "stream": "**/*"}
"""Pattern of the files that a source reads, below the path of the dataset."""

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json.gz", ".json")
HUB_RETRIES = 8
"""Successive attempts to open a hub file again before the run stops: about eight minutes in all."""

_OTHER_SPLIT = re.compile(r"(?<![a-z])(test|valid|validation|dev|eval)(?![a-z])", re.IGNORECASE)

ROWS_AT_ONCE = 256


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

    def rows(self, start: int, field: str, limit: int) -> Iterator[Row]:
        """Yields the rows of the file from row `start` on; rows before it are not parsed.

        Args:
            start: First row to yield, counted from 0.
            field: Column of a parquet file that holds the text; JSON lines are yielded unparsed.
            limit: Most bytes of a row; longer rows come without content.

        Raises:
            ConfigError: It is a parquet file and pyarrow is not installed.
            DataError: The file, rather than a row of it, is damaged or cannot be read.
        """
        failures = 0
        while True:
            try:
                with self.open() as file:
                    for row in self._read(file, start, field, limit):
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

    def _read(self, file: BinaryIO, start: int, field: str, limit: int) -> Iterator[Row]:
        if self.name.endswith(".parquet"):
            return read_parquet_rows(file, self.path, start, limit, field)
        lines = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if self.name.endswith(".gz") else file
        return read_json_rows(lines, self.path, start, limit)


def find_shards(path: str, pattern: str | None, source: str = "stream") -> list[Shard]:
    """Lists the shards of a dataset in the order of their names.

    Args:
        path: Directory or file; or, where there is none of that name, a hub dataset as `owner/name`, which `@revision`
            and a place in the dataset may follow (`allenai/c4@main/en`). The path may end in a pattern.
        pattern: Pattern of the files below `path`; None takes the usual one of the source.
        source: Kind of the dataset: `openwebmath`, `c4` or `stream`.

    Raises:
        ConfigError: No pattern is given, and there are shards of several splits.
        DataError: There is no such directory, hub dataset or shard.
    """
    if "*" in path:
        parts = PurePosixPath(path).parts
        first = next(place for place, part in enumerate(parts) if "*" in part)
        path, pattern = str(PurePosixPath(*parts[:first])), "/".join(parts[first:])
    place = Path(path)
    wanted = pattern or PATTERNS[source]
    if place.is_file():
        found = [_local_shard(place, place.parent)]
    elif place.is_dir():
        found = _local_shards(place, wanted)
        if not found and pattern is None:  # a copy of some shards rather than of the dataset
            found = _local_shards(place, wanted.rpartition("/")[2])
    elif is_local(path):
        raise DataError(f"data.path: {path}: no such file or directory")
    else:
        found = _hub_shards(path, wanted)
    found = sorted((shard for shard in found if shard.name.endswith(SUFFIXES)), key=lambda shard: shard.name)
    if not found:
        raise DataError(f"{path}: no shard ({', '.join(SUFFIXES)}) matches {wanted!r}; data.shards names those to read")
    if wanted == PATTERNS["stream"]:
        _check_one_split(path, found)
    return found


def is_local(path: str) -> bool:
    """Returns whether a path is on this machine and not looked for on the hub."""
    return path.startswith((".", "~", os.sep)) or Path(path).exists()


def _check_one_split(path: str, shards: list[Shard]) -> None:
    others = [shard.name for shard in shards if _OTHER_SPLIT.search(shard.name)]
    if 0 < len(others) < len(shards):
        raise ConfigError(
            f"data.shards: missing; {path} has shards that look like another split ({others[0]}). "
            "Name those to train on, such as '**/train*'"
        )


def _local_shards(directory: Path, pattern: str) -> list[Shard]:
    if pattern == PATTERNS["stream"]:
        everything = [file for file in directory.glob(pattern) if file.suffix != ".json"]  # those are descriptions
    else:
        everything = list(directory.glob(pattern))
    hidden = [file for file in everything if any(part.startswith(".") for part in file.relative_to(directory).parts)]
    return [_local_shard(file, directory) for file in everything if file.is_file() and file not in hidden]


def _local_shard(file: Path, directory: Path) -> Shard:
    name = file.relative_to(directory).as_posix()
    return Shard(str(file), name, file.stat().st_size, partial(cast(Any, open), file, "rb"))


def _hub_shards(path: str, pattern: str) -> list[Shard]:
    from huggingface_hub import HfFileSystem  # half a second that other sources need not wait for

    root = f"datasets/{path}"
    if path.endswith(SUFFIXES):
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
    everything = pattern.endswith(PATTERNS["stream"])
    return [
        Shard(path, path.removeprefix(f"{root}/"), entry["size"], partial(filesystem.open, path, "rb"), HUB_RETRIES)
        for path, entry in described.items()
        if entry["type"] == "file" and not (everything and path.endswith(".json"))
    ]


def read_parquet_rows(file: BinaryIO, source: str, start: int, limit: int, column: str) -> Iterator[Row]:
    """Yields the rows of a parquet file from row `start` on; row groups before it are not read.

    Args:
        file: Parquet file, open for reading bytes and seekable.
        source: Name of the file in messages.
        start: First row to yield, counted from 0.
        limit: Most bytes of a row's text; a longer row comes without content.
        column: Column that holds the text.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: The file is not a parquet file, or has no such column of text.
    """
    arrow, parquet = _pyarrow()
    try:
        table = parquet.ParquetFile(file)
    except arrow.ArrowInvalid as error:
        raise DataError(f"{source}: not a whole parquet file: {error}") from error
    _check_column(table.schema_arrow, source, column, arrow)
    sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    first_rows = np.cumsum([0, *sizes])
    group = int(np.searchsorted(first_rows, start, side="right")) - 1
    if group == len(sizes):
        return
    index = int(first_rows[group])
    groups = range(group, len(sizes))
    for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=[column], use_threads=False):
        for text in _bytes(batch.column(0), arrow):
            if index >= start:
                yield _row(text, source, index, limit, column)
            index += 1


def _row(text: bytes | None, source: str, index: int, limit: int, column: str) -> Row:
    if text is None:
        return Row(source, index, None, f"column {column!r} is null, needs a text", is_json=False)
    if len(text) > limit:
        return Row(source, index, None, too_long(limit), is_json=False)
    return Row(source, index, text, is_json=False)


def _bytes(values: Any, arrow: Any) -> list[bytes | None]:
    """Returns the texts as stored bytes: a row that is not UTF-8 must not spoil the others."""
    if arrow.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    found: list[bytes | None] = values.cast(arrow.large_binary()).to_pylist()
    return found


def _check_column(schema: Any, source: str, column: str, arrow: Any) -> None:
    if column not in schema.names:
        columns = ", ".join(map(repr, schema.names[:10]))
        raise DataError(
            f"{source}: has no column {column!r} (its columns: {columns}); data.field names the one to read"
        )
    kind = schema.field(column).type
    text = kind.value_type if arrow.types.is_dictionary(kind) else kind
    if not (arrow.types.is_string(text) or arrow.types.is_large_string(text) or arrow.types.is_string_view(text)):
        raise DataError(f"{source}: column {column!r} holds {kind}, needs string")


def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(
            "data.source: parquet shards need pyarrow, which is not installed; pip install 'quietstar[data]'"
        ) from error
