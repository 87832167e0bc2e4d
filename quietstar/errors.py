"""The errors that a user's input can cause, and how a command ends after them and after those of the machine.

Every message names the culprit, what was wrong and what would be right. `run_command` is the way in and out of every
command.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self, TextIO


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


class ServerError(QuietStarError):
    """A server that samples cannot be reached, or answers what cannot be used; the message begins with its address."""


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


_CONTROL = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ufeff\\U000e0000-\\U000e007f]"
)
_OF_BARS = re.compile(r"((?:\r|\x1b\[A)*)(.*?)(\r*)", re.DOTALL)
"""What a progress bar writes before and after its text, to draw over itself."""
_IN_RUST = re.compile(r"\(os error (\d+)\)")
_KEPT = "what is finished is kept"
_ADVICE = {
    errno.ENOSPC: "make room and give the same command again",
    errno.EDQUOT: "make room within your quota and give the same command again",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f) and give the same command again",
    errno.EROFS: "needs a place that you may write to",
    errno.EACCES: "needs a path that you may use",
    errno.EPERM: "needs a path that you may use",
    errno.EIO: "the disk has failed; check it and give the same command again",
    errno.EMFILE: "raise the limit of open files (ulimit -n) and give the same command again",
    errno.ENFILE: "the machine has too many open files; give the same command again when it has fewer",
    errno.ENOENT: "needs a path in a directory that is there",
    errno.ENAMETOOLONG: "needs a shorter path",
    errno.ELOOP: "needs a path whose links come to an end",
    errno.EISDIR: "needs the name of a file",
    errno.ENOTDIR: "needs a path of directories",
}


def escape_controls(text: str) -> str:
    r"""Returns a text with the characters that would control a terminal or turn its lines around in the form `\u001b`.

    Line feeds and tabs stay. JSON stays JSON with the same content.
    """
    return _CONTROL.sub(lambda found: json.dumps(found[0])[1:-1], text)


def system_error(error: BaseException) -> OSError | None:
    """Returns what the operating system refused, also where a library in Rust says so; None for another error."""
    if isinstance(error, OSError):
        return error
    found = _IN_RUST.search(str(error)) if isinstance(error, Exception) else None
    return None if found is None else OSError(int(found[1]), os.strerror(int(found[1])))


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Gives what the operating system refuses within this context the path of a file: a write alone does not name it.

    Raises:
        OSError: The system refused something; `filename` is the path.
    """
    try:
        yield
    except QuietStarError:
        raise
    except Exception as error:
        refused = system_error(error)
        if refused is None:
            raise
        raise OSError(refused.errno, refused.strerror or str(refused), os.fspath(path)) from error


def run_command(command: Callable[[], object]) -> int:
    """Runs a command as a tool of Unix: one line for what a user or the machine has caused, and an exit status.

    A command imports what it needs inside the function that it gives to this one, so that a signal during an import is
    answered too. While it runs, stderr loses what nobody takes, and no character stops an output or controls a
    terminal. What is written to stdout goes unchanged to a file or a pipe.

    Args:
        command: Function that does the work of the command.

    Returns:
        The exit status: 0; 2 after a `QuietStarError`, or where the operating system refused something, such as room on
        a disk; 130 after Ctrl-C; 141 where the reader of stdout has gone. Any other exception is a bug and keeps its
        traceback.

    Raises:
        SystemExit: After `--help`, or after a signal that the command has answered.
    """
    with _Streams(), _Interruption() as interruption:
        try:
            try:
                command()
            except SystemExit:
                sys.stdout.flush()
                raise
            sys.stdout.flush()
        except KeyboardInterrupt:
            interruption.tell()
        except BrokenPipeError:
            return 128 + signal.SIGPIPE
        except Exception as error:
            if not interruption.told:  # else it may come of the interruption: a library has turned it into another
                problem = _problem(error)
                if problem is None:
                    raise
                with suppress(OSError):  # where nobody takes it the status says enough
                    print(escape_controls(f"error: {problem}".replace("\n", " ")), file=sys.stderr, flush=True)
                return 2
        return 128 + signal.SIGINT if interruption.told else 0


def _problem(error: Exception) -> str | None:
    if isinstance(error, QuietStarError):
        return str(error)
    refused = system_error(error)
    if refused is None:
        return None
    named = "" if refused.filename is None else f"{os.fsdecode(refused.filename)}: "
    advice = _ADVICE.get(refused.errno or 0, "mend it and give the same command again")
    return f"{named}{refused.strerror or refused}; {advice}; {_KEPT}"


class _Interruption:
    """Context in which the first Ctrl-C is told in one line and raises KeyboardInterrupt; a second one ends at once.

    Attributes:
        told: Whether there was one.
    """

    def __init__(self) -> None:
        self.told = False

    def __enter__(self) -> Self:
        self._unraisable = sys.unraisablehook
        # not where a shell's background job ignores it, nor outside the main thread, where Python allows no handler
        self._mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) in (
            signal.default_int_handler,
            signal.SIG_DFL,
        )
        if self._mine:
            signal.signal(signal.SIGINT, self._stop)
            sys.unraisablehook = self._not_lost
        return self

    def __exit__(self, *_: object) -> None:
        if self._mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.unraisablehook = self._unraisable

    def tell(self) -> None:
        """Writes the line, once."""
        if not self.told:
            self.told = True
            line = f"interrupted; {_KEPT}\n"
            with suppress(OSError, ValueError, AttributeError):  # stderr may be no file, or none at all
                if sys.stderr.fileno() == 2:
                    # os.write, not print: a handler may run in the middle of another write to the same stream
                    os.write(2, (f"\n{line}" if os.isatty(2) else line).encode())
                    return
            print(line, end="", file=sys.stderr)

    def _stop(self, number: int, _: FrameType | None) -> None:
        if self.told:
            os._exit(128 + number)
        self.tell()
        raise KeyboardInterrupt

    def _not_lost(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Raises again what came where Python can only print it, such as in the callbacks of an import."""
        if unraisable.exc_type is KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
        elif not self.told:
            self._unraisable(unraisable)


class _Streams:
    """Context in which the process' own standard streams are there and take every text; others are left as they are."""

    def __enter__(self) -> None:
        for descriptor in range(3):
            try:
                os.fstat(descriptor)
            except OSError:  # closed: the next file that is opened would get what is meant for the stream
                os.open(os.devnull, os.O_RDWR)
        self._before = sys.stdin, sys.stdout, sys.stderr
        if sys.stdin is None:
            sys.stdin = open(0, closefd=False)
        if sys.stdout is sys.__stdout__:
            sys.stdout = _Stream(1, sys.stdout)
        if sys.stderr is sys.__stderr__:
            sys.stderr = _Stream(2, sys.stderr)

    def __exit__(self, *_: object) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = self._before


class _Stream(io.TextIOWrapper):
    """Standard output or error of a command: escapes what its encoding lacks, and control characters for people."""

    def __init__(self, descriptor: int, like: TextIO | None) -> None:
        if like is not None:
            with suppress(OSError):
                like.flush()
        self._is_error = descriptor == 2
        super().__init__(
            io.BufferedWriter(_Descriptor(descriptor, "wb", closefd=False)),
            encoding="utf-8" if like is None else like.encoding,
            errors="backslashreplace",
            line_buffering=self._is_error or os.isatty(descriptor),
            write_through=self._is_error or getattr(like, "write_through", False),
        )
        self._for_people = self._is_error or os.isatty(descriptor)

    def write(self, text: str) -> int:
        if self._is_error:
            before, text, after = _OF_BARS.fullmatch(text).groups()  # type: ignore[union-attr]  # it takes every text
            return super().write(before + escape_controls(text) + after)
        return super().write(escape_controls(text) if self._for_people else text)


class _Descriptor(io.FileIO):
    """A file that raises the first error of stdout, and drops what comes after it; stderr raises none."""

    _has_failed = False

    def write(self, data: Any) -> int:
        if not self._has_failed:
            try:
                return super().write(data)
            except OSError as error:
                if self.fileno() == 1:
                    self._has_failed = True  # a buffer would write the rest again, at the latest when it is closed
                    error.filename = "standard output"
                    raise
        return memoryview(data).nbytes
