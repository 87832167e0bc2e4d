"""Telling "out of memory" from every other error."""

from __future__ import annotations

import re
from pathlib import Path

import torch

TEXTS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How allocators say it that raise a plain RuntimeError: that of the CPU, CUDA's driver, Triton's launcher, cuBLAS."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no memory left. PyTorch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS)


def available_memory() -> int | None:
    """Bytes of host memory that a process can still get, or None where the system does not say."""
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), flags=re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024
