"""Outputs in the middle of larger buffers: what a kernel writes outside of them, or leaves out inside, shows."""

from __future__ import annotations

import torch
from torch import Tensor

SENTINEL = 12288.0
"""A value that all floating dtypes hold exactly and no test computes."""

BAND = 64


def guarded(shape: tuple[int, ...], dtype: torch.dtype, columns: int | None = None) -> tuple[Tensor, Tensor]:
    """A view of `shape` filled with the sentinel, and the buffer that it lies in, filled with it too.

    Args:
        columns: elements of a row in memory, where rows are padded; else the view is contiguous.
    """
    *outer, width = shape
    stride = columns or width
    count = stride
    for size in outer:
        count *= size
    buffer = torch.full((BAND + count + BAND,), SENTINEL, dtype=torch.float64).to(dtype)
    return buffer[BAND : BAND + count].view(*outer, stride)[..., :width], buffer


def assert_intact(buffer: Tensor, view: Tensor, padding: float = SENTINEL) -> None:
    """Everything inside of the view was written, nothing outside; rows' padding may have become `padding`."""
    assert not bool((view == SENTINEL).any())
    rest = buffer.clone()
    inside = rest[BAND : rest.numel() - BAND].view(*view.shape[:-1], -1)
    written = inside[..., view.shape[-1] :]
    assert bool(((written == SENTINEL) | (written == padding)).all())
    inside.fill_(SENTINEL)
    assert bool((rest == SENTINEL).all())
