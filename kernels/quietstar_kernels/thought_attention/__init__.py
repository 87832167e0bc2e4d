"""Diagonal attention of parallel thoughts (Quiet-STaR, arXiv 2403.09629, section 4.2 and figure 3).

Every stream hangs from an anchor in the text: it sees the text up to its anchor and itself, never another stream.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from quietstar_kernels.dispatch import (
    require_device,
    require_floating,
    require_integer,
    require_shape,
    resolve_backend,
)
from quietstar_kernels.thought_attention.reference import thought_attention_reference
from quietstar_kernels.thought_attention.torch_backend import thought_attention_torch

__all__ = ["thought_attention"]


@overload
def thought_attention(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_thought: Tensor,
    v_thought: Tensor,
    anchor: Tensor,
    *,
    text_start: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def thought_attention(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_thought: Tensor,
    v_thought: Tensor,
    anchor: Tensor,
    *,
    text_start: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def thought_attention(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_thought: Tensor,
    v_thought: Tensor,
    anchor: Tensor,
    *,
    text_start: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every stream to the text before its anchor and to itself, in one softmax.

    Query (p, s) sees text key j where text_start <= j <= anchor[p] and anchor[p] - j < window, and its own stream's
    keys t <= s + (T - S). S == T is the training pass; S == 1 is one sampling step over a stream of T tokens. Several
    thoughts at one position repeat its anchor: the text keys are stored once. Scores, softmax and sums are float32
    (float64 where an input is float64). Tiles are planned on the host: an anchor or text_start on a CUDA device is
    copied there, for which the host waits, so a caller with many layers should copy them once and pass those.

    Args:
        q: [B, P, S, H, D] queries of P streams, any floating dtype; like every input it may be a non-contiguous view.
        k_text: [B, L, Hkv, D] text keys; query head h reads key head h // (H // Hkv).
        v_text: [B, L, Hkv, D] text values.
        k_thought: [B, P, T, Hkv, D] keys of the streams, T >= S.
        v_thought: [B, P, T, Hkv, D] values of the streams.
        anchor: int32 or int64, [P] or [B, P], non-decreasing along P, 0 <= anchor < L, on any device.
        text_start: int32 or int64 [B], on any device, the first text position that is not left padding; None: no
            padding. A stream whose anchor lies in the padding sees itself only.
        window: sliding window in text positions, measured from the anchor; None: the whole text.
        scale: factor of the scores; None: D ** -0.5.
        backend: "auto", "torch" or "reference".
        return_lse: also return the log-sum-exp of the scaled scores.

    Returns:
        out [B, P, S, H, D] in q's dtype; with `return_lse` also lse [B, P, S, H], natural logarithm, float32 (float64
        where an input is float64). Both are differentiable.

    Raises:
        TypeError: a tensor of the wrong kind of dtype.
        ValueError: a shape, anchor, window or backend that does not fit; the message names the argument.
    """
    tensors = {"q": q, "k_text": k_text, "v_text": v_text, "k_thought": k_thought, "v_thought": v_thought}
    for name, tensor in tensors.items():
        require_floating(name, tensor)
        require_device(name, tensor, q.device)
    sizes: dict[str, int] = {}
    require_shape("q", q, ("B", "P", "S", "H", "D"), sizes)
    require_shape("k_text", k_text, ("B", "L", "Hkv", "D"), sizes)
    require_shape("v_text", v_text, ("B", "L", "Hkv", "D"), sizes)
    require_shape("k_thought", k_thought, ("B", "P", "T", "Hkv", "D"), sizes)
    require_shape("v_thought", v_thought, ("B", "P", "T", "Hkv", "D"), sizes)
    if sizes["Hkv"] < 1 or sizes["H"] % sizes["Hkv"] != 0:
        raise ValueError(f"k_text: got {sizes['Hkv']} key heads, wanted a divisor of q's {sizes['H']} heads")
    if sizes["T"] < sizes["S"]:
        raise ValueError(f"k_thought: got T={sizes['T']} keys in a stream, wanted at least q's S={sizes['S']}")
    if window is not None and window < 1:
        raise ValueError(f"window: got {window}, wanted at least 1, or None for the whole text")
    if text_start is not None:
        require_integer("text_start", text_start)
        require_shape("text_start", text_start, ("B",), sizes)
    anchor = _check_anchor(anchor, sizes)
    if scale is None:
        scale = sizes["D"] ** -0.5
    run = thought_attention_torch if resolve_backend(backend) == "torch" else thought_attention_reference
    with torch.autocast(q.device.type, enabled=False):  # autocast would round the scores
        out, lse = run(q, k_text, v_text, k_thought, v_thought, anchor, text_start, window, scale)
    return (out, lse) if return_lse else out


def _check_anchor(anchor: Tensor, sizes: dict[str, int]) -> Tensor:
    """Check dtype, shape, range and order; returns the anchors on the host, where the tiles are planned."""
    require_integer("anchor", anchor)
    require_shape("anchor", anchor, ("P",) if anchor.dim() == 1 else ("B", "P"), sizes)
    anchor = anchor.detach().cpu()
    if anchor.numel() == 0:
        return anchor
    low, high = (int(bound) for bound in anchor.aminmax())
    if low < 0 or high >= sizes["L"]:
        culprit = low if low < 0 else high
        raise ValueError(f"anchor: got {culprit}, wanted text positions 0 <= anchor < L={sizes['L']}")
    if bool((anchor[..., 1:] < anchor[..., :-1]).any()):
        raise ValueError("anchor: got a decreasing sequence, wanted anchors in non-decreasing order along P")
    return anchor
