"""Block sizes, warps and pipeline stages of every kernel: a table pinned per architecture, never tuned at run time.

`configurations.json` maps an architecture, a kernel and a case to one configuration. The case is what shapes the
generated code and nothing else, such as the head size and the bytes of an element; numbers of rows never are part of
it, so that a batch of another size compiles nothing and sums in the same order. `benchmarks/tune.py` writes the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from quietstar_kernels.dispatch import interpreting

Configuration = dict[str, int]
"""Block sizes in capitals, `num_warps`, `num_stages` and, where a thread may have only so many, `maxnreg` registers."""

PATH = Path(__file__).with_name("configurations.json")

_override: dict[str, Configuration] = {}


@cache
def table() -> dict[str, dict[str, dict[str, Configuration]]]:
    """Architecture -> kernel -> case -> configuration."""
    loaded: dict[str, dict[str, dict[str, Configuration]]] = json.loads(PATH.read_text(encoding="utf-8"))
    return loaded


@cache
def architecture(device: torch.device) -> str:
    """The row of the table for a device: its own architecture's, or that of the nearest one with as much memory.

    Chips with the 99 KiB of shared memory of sm_86 (GeForce, L4, L40S) share its row.

    Raises:
        ValueError: a GPU older than sm_80, whose memory no configuration fits.
    """
    if interpreting():
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) == (8, 0):
        return "sm_80"
    if major == 9:
        return "sm_90"
    if major in (10, 11):
        return "sm_100"
    if major < 8:
        raise ValueError(f"backend: 'triton' wants compute capability 8.0 or more, {device} has {major}.{minor}")
    return "sm_86"


def configuration(kernel: str, case: str, device: torch.device) -> Configuration:
    """The configuration of a kernel for a case on a device.

    Raises:
        ValueError: the table has none.
    """
    if kernel in _override:
        return _override[kernel]
    row = architecture(device)
    found = table()[row].get(kernel, {}).get(case)
    if found is None:
        raise ValueError(f"{kernel}: no configuration for {case} on {row}; use backend='torch'")
    return found


@contextmanager
def use_configuration(kernel: str, chosen: Configuration) -> Iterator[None]:
    """Within the block, run `kernel` with another configuration: for the tuner and for tests."""
    before = dict(_override)
    _override[kernel] = chosen
    try:
        yield
    finally:
        _override.clear()
        _override.update(before)
