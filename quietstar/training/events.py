"""`events.jsonl`: what happened to a run, in the order in which it happened; lines are never taken back."""

from __future__ import annotations

import errno
import json
import os
import time
from contextlib import suppress
from pathlib import Path

EVENTS = "events.jsonl"


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
