"""Writing files that another process may read at any moment."""

from __future__ import annotations

import os
from pathlib import Path


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
