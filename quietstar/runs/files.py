"""Writing files that another process may read at any moment, into directories that can be written to.

What a run writes beside its checkpoints, and whether what is there already comes from the same options.

`events.jsonl`: what happened to a run, in the order in which it happened; lines are never taken back.

One process per run directory.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from quietstar.errors import ConfigError

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
ENVIRONMENT = "environment.json"
SAMPLES = "samples"
"""Directory of a training run's sampled thoughts."""
REPORT = "report.html"
THOUGHTS = "thoughts.html"
"""The viewer's page."""
STORE = "samples.jsonl"
"""Every completion that a run of STaR or V-STaR has sampled."""
KEPT = "kept.jsonl"
"""What an iteration trains on."""
SUMMARY = "summary.json"
COMPARISON = "comparison.json"


def write_whole(path: Path, text: str) -> None:
    """Writes UTF-8 text to a file that is whole, or as it was before, even if the process dies.

    Args:
        path: In a directory that exists.
        text: Without lone surrogates.

    Raises:
        OSError: It cannot be written; what was there stays, and nothing else is left behind.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def make_output_dir(directory: Path, option: str = "output_dir") -> None:
    """Makes a directory where there is none, and tries to write into it.

    Args:
        directory: To be written to.
        option: That names it, for the message.

    Raises:
        ConfigError: It cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(
            f"{option}: cannot write to {directory} ({error.strerror}); needs a directory that you may write to"
        ) from None


def write_json(file: Path, value: Any) -> None:
    """Write plain values to a file that is whole or as before, even if the process dies."""
    write_whole(file, json.dumps(value, indent=1) + "\n")


def append_json(file: Path, value: Any) -> None:
    """Add one value to the list in a file, which is whole or as before; what is no list there is begun anew."""
    try:
        before = json.loads(file.read_bytes())
    except (OSError, ValueError):
        before = []
    write_json(file, [*(before if isinstance(before, list) else []), value])


def changed_options(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A phrase with the old and the new value for each dotted key whose values differ; a missing one counts as None."""
    return [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


class EventLog:
    """Appends `{"time", "step", "event", "message"}`, times in seconds since 1970. A full disk loses a line, no more.

    Args:
        directory: The run directory.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / EVENTS

    def write(self, step: int, event: str, message: str) -> None:
        """Notes one event.

        Args:
            step: Optimizer steps done, or the step that the event is about.
            event: One word, such as `resumed` or `skipped`.
            message: For people.
        """
        line = json.dumps({"time": round(time.time(), 3), "step": step, "event": event, "message": message})
        with suppress(OSError):  # an event that cannot be noted must not stop what it is about
            _append(self._path, line.encode() + b"\n")


def _append(path: Path, line: bytes) -> None:
    """Adds a line, or nothing of it."""
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


LOCK = ".lock"


class RunLock:
    """Held while a process writes to a run directory. The kernel releases it with the process, however that ends.

    Args:
        directory: The run directory, which exists.

    Raises:
        ConfigError: when entered, while another process holds it; the message names that process. Or its file is not
            one that can be written.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
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
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The file stays: removing it would let two later processes lock two files of one name.
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
