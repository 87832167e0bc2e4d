"""Which text positions think."""

from __future__ import annotations

import torch
from torch import Tensor

from quietstar.errors import DataError
from quietstar.model.backbone import OutputHead
from quietstar.positions import parse_positions

ENTROPY_CHUNK = 1 << 24
"""Elements of a float32 logits chunk while entropies are computed (64 MiB)."""
INTEGERS = (torch.int32, torch.int64)


def expand_anchors(
    anchors: Tensor | str | None, token_mask: Tensor, base_entropy: Tensor | None, thoughts_per_position: int
) -> Tensor:
    """The anchor of every stream.

    Args:
        anchors: None or "all" for every position but the last, a string of `parse_positions`, or int [A] or [B, A].
            "every:N" counts from the first text token of each row. A fraction K is one of L - 1.
        token_mask: bool [B, L].
        base_entropy: [B, L] entropy of the base prediction, needed for "entropy:K" alone.
        thoughts_per_position: K, how often each anchor is repeated.

    Returns:
        int32 [B, P] with P = A*K, non-decreasing in each row.

    Raises:
        ConfigError: An unknown string.
        DataError: Anchors of a wrong dtype or shape, or outside the text.
    """
    batch, length = token_mask.shape
    device = token_mask.device
    if anchors is None or isinstance(anchors, str):
        kind, value = parse_positions("all" if anchors is None else anchors)
        last = max(length - 1, 1)  # nothing follows the last token, so its thought has nothing to learn from
        if kind == "entropy":
            assert base_entropy is not None
            count = min(last, max(1, round(value * last) if value < 1 else int(value)))
            # Padding, and the last token before it, are taken only where a row has too few others.
            predicts = token_mask[:, :last] & token_mask[:, -last:]
            ranked = base_entropy[:, :last].masked_fill(~predicts, -1.0)
            chosen = ranked.topk(count, dim=1).indices.sort(dim=1).values
        else:
            chosen = torch.arange(0, last, int(value), device=device)
            if value > 1:
                start = token_mask.int().argmax(1, keepdim=True)
                chosen = (chosen + start % int(value)).clamp_max(length - 1)
    else:
        chosen = torch.as_tensor(anchors, device=device)
        if chosen.ndim not in (1, 2) or (chosen.ndim == 2 and chosen.shape[0] != batch) or chosen.dtype not in INTEGERS:
            raise DataError(
                f"anchors: got {chosen.dtype} of shape {list(chosen.shape)}, needs integers [A] or [{batch}, A]"
            )
        if chosen.numel() and (int(chosen.min()) < 0 or int(chosen.max()) >= length):
            raise DataError(
                f"anchors: got {int(chosen.min())}..{int(chosen.max())}, needs positions in the text, 0..{length - 1}"
            )
        chosen = chosen.sort(dim=-1).values
    return chosen.to(torch.int32).expand(batch, -1).repeat_interleave(thoughts_per_position, dim=1).contiguous()


def base_entropy(hidden: Tensor, head: OutputHead) -> Tensor:
    """Entropy in nats of the prediction from each hidden state, in chunks of rows.

    Args:
        hidden: [B, L, E] after the final norm.
        head: With V tokens.

    Returns:
        float32 [B, L].
    """
    parts = []
    for rows in hidden.flatten(0, 1).split(max(1, ENTROPY_CHUNK // head.weight.shape[0])):
        logprobs = head.logits(rows).float().log_softmax(-1)
        parts.append(-(logprobs.exp() * logprobs).sum(-1))
    return torch.cat(parts).view(hidden.shape[:-1])
