"""Drawing tokens, so that a draw depends only on the sample's own random stream and probabilities.

The uniform number of each token is a hash of (seed, index of the token); it picks the token by the inverse of the
cumulative distribution. Both are computed with integers, whose sums are the same in any order and on any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""The constants of SplitMix64 (Steele, Lea and Flood 2014)."""
RESOLUTION = 2.0**48
"""Parts that a probability of 1 is counted in; a token with less than one part is never drawn."""


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """Return the first `count` numbers of each seed's stream, float64 [len(seeds), count] in [0, 1)."""
    return numbers_of(torch.tensor([signed(seed) for seed in seeds], dtype=torch.int64), count)


def numbers_of(seeds: Tensor, count: int) -> Tensor:
    """Return the same for seeds that are a tensor, int64 [B], on its device, where nothing waits for them."""
    index = torch.arange(1, count + 1, device=seeds.device) * signed(GOLDEN)
    bits = _mix(_mix(seeds)[:, None] + index)
    return _shift(bits, 11).double() * 2.0**-53


def substream(seed: int, index: int) -> int:
    """Return the seed of an independent stream for the index-th stage, from 0, of a sample with this seed."""
    return (seed + (index + 1) * GOLDEN) % 2**64


def draw(
    logits: Tensor, uniform: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits: Logits of each row, [B, V]; the computation is in float32, or float64 for float64 logits.
        uniform: Uniform random numbers, float64 [B] in [0, 1); not used at temperature 0.
        temperature: Sampling temperature; 0 takes the most probable token.
        top_k: Number of most probable tokens to draw from, with those that tie with the last of them; 0 takes all.
        top_p: Share of the probability; of the tokens left by `top_k`, the fewest most probable with this share stay.

    Returns:
        Tokens, int64 [B], and their log-probabilities, [B] in nats, at temperature 1 with every token allowed.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        token = draw_from(likeliest(torch.softmax(logits / temperature, -1), top_k, top_p), uniform)
    logprob = logits.gather(-1, token[:, None]).squeeze(-1) - torch.logsumexp(logits, -1)
    return token, logprob


def draw_from(probability: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token per row, int64 [B].

    Args:
        probability: Probabilities of the tokens, [B, V]; they need not sum to 1. 16 bits are read as float32.
        uniform: Uniform random numbers, float64 [B] in [0, 1).
    """
    probability = probability.to(torch.promote_types(probability.dtype, torch.float32))
    cumulative = (probability * RESOLUTION).long().cumsum(-1)
    total = cumulative[:, -1]
    threshold = torch.minimum((uniform * total).long(), total - 1)
    token = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(-1)
    return token.clamp(max=probability.shape[-1] - 1)  # NaN has no order: the caller finds it in the log-probability


def likeliest(probability: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return the probabilities, [B, V], with zeros for the tokens that `draw` leaves out; not normalised."""
    if 0 < top_k < probability.shape[-1]:
        least = probability.topk(top_k).values[:, -1:]
        probability = probability.where(probability >= least, 0.0)
    if top_p < 1:
        ordered = probability.sort(-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        kept = (before < top_p * ordered.sum(-1, keepdim=True)).sum(-1, keepdim=True)
        least = ordered.gather(-1, (kept - 1).clamp(min=0))
        probability = probability.where(probability >= least, 0.0)
    return probability


def signed(number: int) -> int:
    """Return the lowest 64 bits of a number, read as int64."""
    number %= 2**64
    return number - 2**64 if number >= 2**63 else number


def _shift(bits: Tensor, count: int) -> Tensor:
    """Shift right and fill with zeros; PyTorch's own shift of int64 fills with the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """Apply the finalizer of SplitMix64; products wrap around."""
    bits = (bits ^ _shift(bits, 30)) * signed(FIRST)
    bits = (bits ^ _shift(bits, 27)) * signed(SECOND)
    return bits ^ _shift(bits, 31)
