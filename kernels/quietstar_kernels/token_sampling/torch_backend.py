"""Sampling in PyTorch, one chunk of rows at a time: at most `logits.LOGITS_IN_CHUNK` logits, as far as one row fits."""

from __future__ import annotations

import torch
from torch import Tensor

from quietstar_kernels.dispatch import compute_dtype
from quietstar_kernels.logits import LogitOptions, operand_dtype, product, rows_in_chunk


def sample_tokens_torch(
    hidden: Tensor, lm_head: Tensor, uniform: Tensor | None, options: LogitOptions
) -> tuple[Tensor, Tensor]:
    """token and log-probability [N]; see `quietstar_kernels.sample_tokens`. No numbers: greedy."""
    N, V = hidden.shape[0], lm_head.shape[0]
    dtype = compute_dtype(hidden, lm_head)
    head = lm_head.to(operand_dtype(lm_head, dtype, hidden))
    token = torch.empty(N, dtype=torch.int64, device=hidden.device)
    logprob = torch.empty(N, dtype=dtype, device=hidden.device)
    size = rows_in_chunk(V, hidden.device)
    for first in range(0, N, size):
        rows = slice(first, min(first + size, N))
        logits = product(hidden[rows].to(head.dtype), head.T, dtype)  # [n, V]
        options.transform_(logits)
        top, most_probable = logits.max(-1, keepdim=True)
        likelihood = logits.sub_(top).exp_()  # of each token relative to the most probable one
        total = likelihood.sum(-1, keepdim=True)
        chosen = most_probable if uniform is None else _invert(likelihood, uniform[rows].unsqueeze(-1))
        token[rows] = chosen.squeeze(-1)
        logprob[rows] = (likelihood.gather(-1, chosen) / total).log_().squeeze(-1)
    return token, logprob


def _invert(likelihood: Tensor, uniform: Tensor) -> Tensor:
    """First token [n, 1] whose cumulative share of likelihood [n, V] exceeds uniform [n, 1]."""
    cumulative = likelihood.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # strictly below the total, so that some token exceeds it; that token's own likelihood is then positive
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True)
