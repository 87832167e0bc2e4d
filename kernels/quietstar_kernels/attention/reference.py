"""The specification of thought attention: the whole mask and one softmax over text and own keys."""

from __future__ import annotations

import torch
from torch import Tensor

from quietstar_kernels.dispatch import compute_dtype


def thought_attention_reference(
    q_BPSHD: Tensor,
    k_text_BLKD: Tensor,
    v_text_BLKD: Tensor,
    k_thought_BPTKD: Tensor,
    v_thought_BPTKD: Tensor,
    anchor: Tensor,
    text_start: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """out [B, P, S, H, D] and lse [B, P, S, H] (K in the names is Hkv); see `quietstar_kernels.thought_attention`."""
    B, P, S, H, D = q_BPSHD.shape
    L, Hkv = k_text_BLKD.shape[1:3]
    T = k_thought_BPTKD.shape[2]
    dtype = compute_dtype(q_BPSHD, k_text_BLKD, v_text_BLKD, k_thought_BPTKD, v_thought_BPTKD)
    device = q_BPSHD.device

    # query head h = kv * G + g reads key head kv
    q = q_BPSHD.to(dtype).reshape(B, P, S, Hkv, H // Hkv, D)
    text_scores = torch.einsum("bpskgd,bjkd->bpskgj", q, k_text_BLKD.to(dtype)) * scale
    own_scores = torch.einsum("bpskgd,bptkd->bpskgt", q, k_thought_BPTKD.to(dtype)) * scale
    if softcap is not None:
        text_scores, own_scores = (softcap * torch.tanh(x / softcap) for x in (text_scores, own_scores))

    key = torch.arange(L, device=device)
    anchor_BP1 = anchor.to(device).expand(B, P).unsqueeze(-1)
    sees_text = key <= anchor_BP1  # [B, P, L]
    if text_start is not None:
        start = text_start.to(device).unsqueeze(-1)  # [B, P, 1], or [B, 1] where it is one for all streams of a text
        sees_text = sees_text & (key >= (start if text_start.dim() == 2 else start.unsqueeze(-1)))
    if window is not None:
        sees_text = sees_text & (anchor_BP1 - key < window)
    query = torch.arange(S, device=device).unsqueeze(-1)
    sees_own = torch.arange(T, device=device) <= query + (T - S)  # [S, T]

    text_scores = text_scores.masked_fill(~sees_text[:, :, None, None, None, :], float("-inf"))
    own_scores = own_scores.masked_fill(~sees_own[:, None, None, :], float("-inf"))
    scores = torch.cat([text_scores, own_scores], dim=-1)  # [B, P, S, Hkv, G, L + T]
    weights = scores.softmax(dim=-1)
    text_weight, own_weight = weights[..., :L], weights[..., L:]
    out = torch.einsum("bpskgj,bjkd->bpskgd", text_weight, v_text_BLKD.to(dtype))
    out = out + torch.einsum("bpskgt,bptkd->bpskgd", own_weight, v_thought_BPTKD.to(dtype))
    return out.reshape(B, P, S, H, D).to(q_BPSHD.dtype), scores.logsumexp(dim=-1).reshape(B, P, S, H)
