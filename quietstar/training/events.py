"""`events.jsonl`: what happened to a run, in the order in which it happened; lines are never taken back."""

from __future__ import annotations

import json
import time
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
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError:
            pass  # an event that cannot be noted must not stop what it is about
