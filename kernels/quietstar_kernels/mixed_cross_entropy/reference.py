"""The specification of the losses: whole logits and PyTorch's log_softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from quietstar_kernels.dispatch import compute_dtype
from quietstar_kernels.logits import LogitOptions


def mixed_cross_entropy_reference(
    hidden_base_NE: Tensor,
    hidden_thought_NE: Tensor | None,
    weight_N: Tensor | None,
    lm_head_VE: Tensor,
    target_N: Tensor,
    interpolation: str,
    options: LogitOptions,
    ignore_index: int,
) -> Tensor:
    """Loss [N]; see `quietstar_kernels.mixed_cross_entropy`. Without thought and weight: the loss of hidden_base."""
    floating = [x for x in (hidden_base_NE, hidden_thought_NE, weight_N, lm_head_VE) if x is not None]
    dtype = compute_dtype(*floating)
    head = lm_head_VE.to(dtype)
    counted_N = target_N != ignore_index
    safe_target_N = torch.where(counted_N, target_N, 0).long()

    def target_log_prob(hidden_NE: Tensor) -> Tensor:
        logits_NV = options.transform(hidden_NE @ head.T)
        return logits_NV.log_softmax(dim=-1).gather(-1, safe_target_N.unsqueeze(-1)).squeeze(-1)

    base = hidden_base_NE.to(dtype)
    if hidden_thought_NE is None or weight_N is None:
        log_prob = target_log_prob(base)
    else:
        thought, weight = hidden_thought_NE.to(dtype), weight_N.to(dtype)
        if interpolation == "logits":
            log_prob = target_log_prob((1 - weight).unsqueeze(-1) * base + weight.unsqueeze(-1) * thought)
        else:
            log_prob = weight * target_log_prob(thought) + (1 - weight) * target_log_prob(base)
    return torch.where(counted_N, -log_prob, 0.0)
