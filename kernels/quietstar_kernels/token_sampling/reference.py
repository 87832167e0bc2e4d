"""The specification of sampling: whole logits, and the first token whose cumulative probability exceeds the number."""

from __future__ import annotations

import torch
from torch import Tensor

from quietstar_kernels.dispatch import compute_dtype
from quietstar_kernels.logits import LogitOptions


def sample_tokens_reference(
    hidden_NE: Tensor, lm_head_VE: Tensor, uniform_N: Tensor | None, options: LogitOptions
) -> tuple[Tensor, Tensor]:
    """token and log-probability [N]; see `quietstar_kernels.sample_tokens`. No numbers: greedy."""
    dtype = compute_dtype(hidden_NE, lm_head_VE)
    logits_NV = options.transform(hidden_NE.to(dtype) @ lm_head_VE.to(dtype).T)
    if uniform_N is None:
        token_N = logits_NV.argmax(dim=-1)
    else:
        cumulative_NV = logits_NV.double().softmax(dim=-1).cumsum(dim=-1)
        total_N = cumulative_NV[:, -1]
        # strictly below the total, so that some token exceeds it; that token's own probability is then positive
        threshold_N = torch.minimum(uniform_N * total_N, torch.nextafter(total_N, torch.zeros_like(total_N)))
        token_N = (cumulative_NV <= threshold_N.unsqueeze(-1)).sum(dim=-1)
    logprob_N = logits_NV.log_softmax(dim=-1).gather(-1, token_N.unsqueeze(-1)).squeeze(-1)
    return token_N, logprob_N
