"""The files that a run writes beside its checkpoints: their names, and how they are written.

Other processes may read a file at any moment, so it is whole or as it was before (`write_whole`). `EventLog` appends
what happens to a run to `events.jsonl`, and never removes a line. `RunLock` admits one process per run directory.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from quietstar.config.options import check_name
from quietstar.config.parsing import read_json_file
from quietstar.errors import ConfigError, naming

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
ENVIRONMENT = "environment.json"
SAMPLES = "samples"
"""Directory of the sampled thoughts of a training run."""
REPORT = "report.html"
THOUGHTS = "thoughts.html"
"""Page of the viewer of thoughts."""
STORE = "samples.jsonl"
"""Every completion that a run of STaR or V-STaR has sampled."""
KEPT = "kept.jsonl"
"""The completions that an iteration trains on."""
SERVER_LOG = "server.log"
"""What the servers have said that the run has started to sample."""
SUMMARY = "summary.json"
COMPARISON = "comparison.json"

LOCK = ".lock"


def write_whole(path: Path, text: str) -> None:
    """Writes UTF-8 text to a file that is whole, or as it was before, even if the process dies.

    A device or a pipe, such as `/dev/stdout`, is not replaced but written to.

    Args:
        path: Path of the file, in a directory that exists.
        text: Text to write; a part of a path that is not UTF-8 is escaped.

    Raises:
        OSError: The file cannot be written; its old content stays, and no other file is left.
    """
    content = text.encode("utf-8", "backslashreplace")
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    with naming(path):
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        try:
            new.write_bytes(content)
            os.replace(new, path)
        finally:
            with suppress(OSError):
                new.unlink(missing_ok=True)


def make_output_dir(directory: Path, option: str = "output_dir") -> None:
    """Makes a directory where there is none, and checks that it can be written to.

    Args:
        directory: Directory to write to.
        option: Option that names the directory, for the error message.

    Raises:
        ConfigError: The directory cannot be made or written to.
    """
    check_name(directory, option)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(
            f"{option}: cannot write to {directory} ({error.strerror}); needs a directory that you may write to"
        ) from None


@contextmanager
def saving(directory: Path) -> Iterator[None]:
    """Context in which a model, or other tensors, are written to a directory that is there in the end.

    The files that were written then have the mode that every new file has there: safetensors makes them private. The
    other files of the directory keep theirs.

    Raises:
        OSError: The system has refused something, such as room on the disk.
    """
    with naming(directory):
        before = _tensor_files(directory)
        yield
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        mask = re.search(r"^Umask:\s*([0-7]+)$", status, re.MULTILINE)  # os.umask would change it for other threads
        mode = 0o666 & ~int(mask[1], 8) if mask else 0o644
        for file, written in _tensor_files(directory).items():
            if before.get(file) != written:
                file.chmod(mode)


def _tensor_files(directory: Path) -> dict[Path, tuple[int, int]]:
    """Returns inode and time of change of the user's files where a model has its tensors; adapters are one below."""
    found = {}
    for file in (*directory.glob("*.safetensors"), *directory.glob("adapter/*.safetensors")):
        with suppress(OSError):  # another process has removed it
            status = file.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                found[file] = status.st_ino, status.st_mtime_ns
    return found


def write_json(file: Path, value: Any) -> None:
    """Writes plain values to a JSON file that is whole or as before, even if the process dies."""
    write_whole(file, json.dumps(value, indent=1) + "\n")


def append_json(file: Path, value: Any) -> None:
    """Appends a value to the list in a JSON file, which is whole or as before; without a list a new one begins."""
    try:
        before = read_json_file(file)
    except (OSError, ValueError):
        before = []
    write_json(file, [*(before if isinstance(before, list) else []), value])


def changed_options(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns a phrase with the old and the new value for each dotted key that differs; a missing value is None."""
    return [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


class EventLog:
    """Appends `{"time", "step", "event", "message"}` to `events.jsonl`; the time is in seconds since 1970.

    A line that cannot be written, as on a full disk, is lost without an error.

    Args:
        directory: Directory of the run.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / EVENTS

    def write(self, step: int, event: str, message: str) -> None:
        """Appends one event.

        Args:
            step: Number of optimizer steps done, or the step that the event is about.
            event: Kind of the event in one word, such as `resumed` or `skipped`.
            message: Description of the event for a reader.
        """
        line = json.dumps({"time": round(time.time(), 3), "step": step, "event": event, "message": message})
        with suppress(OSError):  # an event that cannot be written must not stop the run
            _append(self._path, line.encode() + b"\n")


def _append(path: Path, line: bytes) -> None:
    """Appends a line as a whole or not at all."""
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            line = b"\n" + line  # the line before it was cut short when its process died
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


class RunLock:
    """A lock that a process holds while it writes to a run directory. The kernel releases it when the process ends.

    Args:
        directory: Directory of the run, which exists.

    Raises:
        ConfigError: On entering, another process holds the lock (the message names the process), or the lock file
            cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:  # a link, or another user's file
            raise ConfigError(
                f"output_dir: cannot lock {self._path} ({error.strerror}); delete it, or choose another output_dir"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "a process that has just started"
            os.close(descriptor)
            raise ConfigError(
                f"output_dir: {self._path.parent} is in use by {holder}; wait for it, or choose another output_dir"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{self._path}: this file system has no locks ({error}); start one process only", stacklevel=2
            )
        with suppress(OSError):  # on a full disk: the lock holds without its note
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # the file stays: after a removal two later processes could each lock a file of this name
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
