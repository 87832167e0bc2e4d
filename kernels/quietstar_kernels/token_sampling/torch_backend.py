"""From a chunk's raw logits to tokens, in PyTorch; `op` makes the chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from quietstar_kernels.logits import LogitOptions


def choose_tokens(
    raw: Tensor, uniform: Tensor | None, token: Tensor, logprob: Tensor, lse: Tensor, options: LogitOptions
) -> None:
    """Write token, its log-probability and the log-sum-exp of the logits, each [n].

    Args:
        raw: [n, V] raw logits, overwritten.
        uniform: [n] uniform random numbers in [0, 1), float64; None: the most probable token.
        token, logprob, lse: [n] drawn token ids, their log-probabilities, and log-sum-exps of the logits, written.
        options: options that make logits of raw logits.
    """
    options.transform_(raw)
    top, most_probable = raw.max(-1, keepdim=True)
    likelihood = raw.sub_(top).exp_()  # of each token relative to the most probable one
    total = likelihood.sum(-1, keepdim=True)
    chosen = most_probable if uniform is None else _invert(likelihood, uniform.unsqueeze(-1))
    token.copy_(chosen.squeeze(-1))
    logprob.copy_((likelihood.gather(-1, chosen) / total).log_().squeeze(-1))
    lse.copy_((total.log_() + top).squeeze(-1))


def _invert(likelihood: Tensor, uniform: Tensor) -> Tensor:
    """First token [n, 1] whose cumulative share of likelihood [n, V] exceeds uniform [n, 1]."""
    cumulative = likelihood.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # strictly below the total, so that some token exceeds it; that token's own likelihood is then positive
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(cumulative, threshold, right=True)
    return found.clamp_(max=likelihood.shape[-1] - 1)  # a row with NaN has none; its log-probability is NaN
