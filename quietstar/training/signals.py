"""What a running training does when it is told to stop, or to save."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from quietstar.errors import Interrupted

STOP = (signal.SIGTERM, signal.SIGINT)
SAVE = signal.SIGUSR1


class StopWaiting(BaseException):
    """A signal came in the middle of a wait."""


class Signals:
    """Notes signals while it is entered, for a loop that looks at it between its steps; afterwards all is as before.

    SIGTERM or SIGINT set `stop`; a second one ends the process at once, as kill -9 would. SIGUSR1 sets `save`. Outside
    the main thread, where Python allows no handlers, nothing is noted.
    """

    def __init__(self) -> None:
        self.stop: signal.Signals | None = None
        self.save = False
        self._interrupting = False
        self._before: dict[signal.Signals, Any] = {}

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within this context, a wait that may be long, the first SIGTERM or SIGINT raises `StopWaiting`, too."""
        self._interrupting = True
        try:
            yield
        finally:
            self._interrupting = False

    def interruption(self, saved: bool) -> Interrupted:
        """The exception that ends the process after `stop`, with the exit status that shells expect."""
        assert self.stop is not None
        return Interrupted(self.stop, saved)

    def __enter__(self) -> Signals:
        self.stop, self.save = None, False
        if threading.current_thread() is threading.main_thread():
            for number in (*STOP, SAVE):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if received == SAVE:
            self.save = True
            return
        if self.stop is not None:
            os._exit(128 + number)
        self.stop = received
        with suppress(OSError):  # the other end of a pipe may have got the same signal, and be gone
            # os.write and not print: a handler may run in the middle of another write to the same stream
            os.write(2, f"\n{received.name}: saving, then stopping; a second signal stops at once\n".encode())
        if self._interrupting:
            raise StopWaiting
