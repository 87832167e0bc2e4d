"""One process per run directory."""

from __future__ import annotations

import fcntl
import os
import socket
import warnings
from pathlib import Path
from types import TracebackType

from quietstar.errors import ConfigError

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
