"""Writing files that another process may read at any moment, into directories that can be written to."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from quietstar.errors import ConfigError


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
