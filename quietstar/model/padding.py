"""Left and right padding of a batch of texts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quietstar.errors import DataError


@dataclass(frozen=True)
class Padding:
    """Where the text of each row lies.

    Args:
        token_mask: bool [B, L], True where there is text.
        start: int32 [B], first text token of each row, or None where no row is padded on the left.
        position_ids: int64 [B, L], positions counted from the first text token, 0 in left padding.
    """

    token_mask: Tensor
    start: Tensor | None
    position_ids: Tensor


def outside_inference(positions: Tensor) -> Tensor:
    """The same values in a tensor that counts its writes: the kernels copy and check others anew in every layer."""
    if not positions.is_inference():
        return positions
    with torch.inference_mode(False):
        return positions.clone()


def read_padding(input_ids: Tensor, attention_mask: Tensor | None) -> Padding:
    """Check a batch and find its padding.

    Args:
        input_ids: int64 [B, L].
        attention_mask: [B, L] of 0 and 1, or None for no padding.

    Raises:
        DataError: `input_ids` or `attention_mask` has a wrong shape, or a row's text is empty or has a gap.
    """
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise DataError(f"input_ids: got shape {list(input_ids.shape)}, needs [batch, length] with at least one token")
    if attention_mask is None:
        token_mask = torch.ones_like(input_ids, dtype=torch.bool)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        return Padding(token_mask, None, positions)
    if attention_mask.shape != input_ids.shape:
        raise DataError(
            f"attention_mask: got shape {list(attention_mask.shape)}, needs that of input_ids, {list(input_ids.shape)}"
        )
    token_mask = attention_mask.bool()
    count = token_mask.sum(1)
    start = token_mask.int().argmax(1)
    index = torch.arange(input_ids.shape[1], device=input_ids.device)
    contiguous = (index >= start[:, None]) & (index < (start + count)[:, None])
    bad = (count == 0) | (contiguous != token_mask).any(1)
    if bad.any():
        row = int(bad.int().argmax())
        what = "masks every token" if int(count[row]) == 0 else "has a gap inside the text"
        raise DataError(f"attention_mask: row {row} {what}; only padding on the left and on the right is supported")
    return Padding(
        token_mask,
        outside_inference(start.int()) if bool((start > 0).any()) else None,
        (index - start[:, None]).clamp_min(0),
    )
