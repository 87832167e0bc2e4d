"""Libraries that say more on import than their users want to read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_bitsandbytes_warnings() -> Iterator[None]:
    """Without a GPU bitsandbytes warns about kernels for 4-bit models, also when it is peft that imports it."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
