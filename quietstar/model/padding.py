"""The padding of a batch of texts, and where the documents of each text begin and end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quietstar.errors import DataError

ONLY_AROUND = "only padding on the left and on the right is supported"


@dataclass(frozen=True)
class Padding:
    """Where the text of each row lies, and where the documents of the row begin and end.

    Args:
        attention_mask: Mask that the padding was read from, [B, L]; None where it was not given.
        token_mask: Mask of the text, bool [B, L], False at padding.
        start: First token in sight, int32: [B], of the row's text, where a row is padded on the left; [B, L], of each
            token's document, where a row has several documents; None where it is 0 for all.
        position_ids: Positions counted from the first token in sight, int64 [B, L]; 0 in left padding.
        has_next: Mask of the tokens whose next token is of the same document, bool [B, L].
        last: Last token of each token's document, int64 [B, L]; in a row of one document the last of the row, padded
            or not.
    """

    attention_mask: Tensor | None
    token_mask: Tensor
    start: Tensor | None
    position_ids: Tensor
    has_next: Tensor
    last: Tensor

    def start_at(self, anchor: Tensor) -> Tensor | None:
        """Return the first text token that streams see, int32 [B] or [B, P], or None where it is 0 for all.

        Args:
            anchor: Text position that each stream starts from, int32 [B, P].
        """
        if self.start is None or self.start.ndim == 1:
            return self.start
        return outside_inference(self.start.gather(1, anchor.long()))

    def last_at(self, anchor: Tensor) -> Tensor:
        """Return the last token of each anchor's document, int64 [B, P].

        Args:
            anchor: Text position that each stream starts from, int32 [B, P].
        """
        return self.last.gather(1, anchor.long())


def outside_inference(positions: Tensor) -> Tensor:
    """Return the values in a tensor that counts its writes: others the kernels copy and check again in every layer."""
    if not positions.is_inference():
        return positions
    with torch.inference_mode(False):
        return positions.clone()


def check_ids(name: str, ids: Any, embedding: Tensor, lowest: int = 0) -> None:
    """Refuse token ids that the embedding table cannot look up.

    Args:
        name: Name of the argument, for error messages.
        ids: Value to check, which should be an integer tensor.
        embedding: Embedding table of the model, [V, E], on the device of the model.
        lowest: Smallest allowed id, below 0 where ids stand for something else too.

    Raises:
        DataError: `ids` is no tensor of int64 or int32, is on another device, or holds an id that does not exist.
    """
    if not isinstance(ids, Tensor):
        raise DataError(f"{name}: got a {type(ids).__name__}, needs a tensor of token ids, int64")
    if ids.dtype not in (torch.int64, torch.int32):
        raise DataError(f"{name}: got {ids.dtype}, needs token ids, int64")
    if ids.device != embedding.device:
        raise DataError(f"{name}: is on {ids.device}, the model is on {embedding.device}; needs the same device")
    if ids.numel():
        low, high = torch.stack(ids.aminmax()).tolist()
        if low < lowest or high >= embedding.shape[0]:
            wrong = low if low < lowest else high
            raise DataError(f"{name}: has the token id {wrong}, needs {lowest} to {embedding.shape[0] - 1}")


def check_mask(input_ids: Tensor, attention_mask: Any) -> None:
    """Refuse a mask that is no tensor on the device of the token ids.

    Raises:
        DataError: The mask is something else.
    """
    if not isinstance(attention_mask, Tensor):
        raise DataError(f"attention_mask: got a {type(attention_mask).__name__}, needs a tensor, [batch, length]")
    if attention_mask.device != input_ids.device:
        raise DataError(f"attention_mask: is on {attention_mask.device}, input_ids on {input_ids.device}")


def read_padding(
    input_ids: Tensor, attention_mask: Tensor | Padding | None, embedding: Tensor | None = None
) -> Padding:
    """Check a batch and find its padding and its documents.

    Args:
        input_ids: Token ids of the texts, int64 [B, L].
        attention_mask: Number of each token's document in its row, 1, 2, ..., never decreasing, and 0 for padding on
            the left and on the right, [B, L]. With only 0 and 1 every row is one document. None: no padding. A
            `Padding` is returned as it is, and the token ids, which it was read with, are not checked again.
        embedding: Embedding table that must have all token ids, [V, E]; None: they are not checked.

    Raises:
        DataError: `input_ids` or `attention_mask` has a wrong shape, a row has no text or a gap in it, or its document
            numbers are negative, fractional or decreasing.
    """
    if not isinstance(input_ids, Tensor):
        raise DataError(f"input_ids: got a {type(input_ids).__name__}, needs a tensor of token ids, int64")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise DataError(f"input_ids: got shape {list(input_ids.shape)}, needs [batch, length] with at least one token")
    if isinstance(attention_mask, Padding):
        return attention_mask
    if embedding is not None:
        check_ids("input_ids", input_ids, embedding)
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids).contiguous()
    whole_row = index[:, -1:].expand_as(input_ids)
    if attention_mask is None:
        return Padding(None, torch.ones_like(input_ids, dtype=torch.bool), None, index, index < whole_row, whole_row)
    check_mask(input_ids, attention_mask)
    if attention_mask.shape != input_ids.shape:
        raise DataError(
            f"attention_mask: got shape {list(attention_mask.shape)}, needs that of input_ids, {list(input_ids.shape)}"
        )
    token_mask, document = attention_mask.bool(), attention_mask.long()
    count = token_mask.sum(1)
    start = token_mask.int().argmax(1)
    contiguous = (index >= start[:, None]) & (index < (start + count)[:, None])
    within = pad(token_mask[:, 1:] & token_mask[:, :-1], (0, 1))  # text whose next token is text
    step = pad(document.diff(dim=1), (0, 1))
    problems = {
        f"masks every token; {ONLY_AROUND}": count == 0,
        f"has a gap inside the text; {ONLY_AROUND}": (contiguous != token_mask).any(1),
        "has a number that is no document's; needs 0 for padding, and 1, 2, ... for documents": (
            (document < 0) | (document != attention_mask)
        ).any(1),
        "returns to an earlier document; needs numbers that do not decrease": (within & (step < 0)).any(1),
    }
    bad = torch.stack(list(problems.values()))
    several = within & (step != 0)
    is_bad, is_shifted, has_several = torch.stack([bad.any(), (start > 0).any(), several.any()]).tolist()
    if is_bad:
        row = int(bad.any(0).int().argmax())
        what = next(what for what, rows in problems.items() if rows[row])
        raise DataError(f"attention_mask: row {row} {what}")
    if not has_several:
        position_ids = (index - start[:, None]).clamp_min(0)
        return Padding(
            attention_mask,
            token_mask,
            outside_inference(start.int()) if is_shifted else None,
            position_ids,
            within,
            whole_row,
        )
    begins = pad(several[:, :-1], (1, 0))
    starts = torch.where(begins, index, start[:, None]).cummax(1).values
    ends = torch.where(several, index, whole_row).flip(1).cummin(1).values.flip(1)
    position_ids = (index - starts).clamp_min(0)
    return Padding(
        attention_mask, token_mask, outside_inference(starts.int()), position_ids, within & (step == 0), ends
    )
