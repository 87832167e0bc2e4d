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
    counted_N = target_N != ignore_index  # n of the N rows
    target_n1 = target_N[counted_N].long().unsqueeze(-1)

    def target_log_prob(hidden_nE: Tensor) -> Tensor:
        logits_nV = options.transform(hidden_nE @ head.T)
        return logits_nV.log_softmax(dim=-1).gather(-1, target_n1).squeeze(-1)

    base = hidden_base_NE[counted_N].to(dtype)
    if hidden_thought_NE is None or weight_N is None:
        log_prob_n = target_log_prob(base)
    else:
        thought, weight = hidden_thought_NE[counted_N].to(dtype), weight_N[counted_N].to(dtype)
        if interpolation == "logits":
            log_prob_n = target_log_prob((1 - weight).unsqueeze(-1) * base + weight.unsqueeze(-1) * thought)
        else:
            log_prob_n = weight * target_log_prob(thought) + (1 - weight) * target_log_prob(base)
    return torch.zeros(target_N.shape, dtype=dtype, device=target_N.device).masked_scatter(counted_N, -log_prob_n)
