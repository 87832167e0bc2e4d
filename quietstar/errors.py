"""The errors that a user's input can cause. Every message names the culprit, what was wrong and what would be right."""

from __future__ import annotations

import signal


class QuietStarError(ValueError):
    """A problem with the input. The commands print it as one line, without a traceback, and exit with status 2."""


class ConfigError(QuietStarError):
    """An option has a value that cannot be used; the message begins with its dotted key."""


class DataError(QuietStarError):
    """Data cannot be read or used, or is not enough; the message names the file and, where there is one, the line."""


class CheckpointError(QuietStarError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class UnsupportedBackboneError(QuietStarError):
    """The base model would ignore or distort thoughts, so it is refused instead of giving silently wrong results."""


class NonFiniteError(QuietStarError, ArithmeticError):
    """A loss, gradient or prediction became NaN or infinite; in training the optimizer has not used it."""


class OutOfMemoryError(QuietStarError, MemoryError):
    """The device has too little memory even for one text at a time."""


class Interrupted(SystemExit):
    """A signal has stopped training. Uncaught, it ends the process with status 128 + signal: 143 or 130.

    Args:
        received: Signal that stopped the training.
        saved: Whether a checkpoint of the last finished step is on the disk.
    """

    def __init__(self, received: signal.Signals, saved: bool) -> None:
        super().__init__(128 + received)
        self.received = received
        self.saved = saved
