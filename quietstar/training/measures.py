"""What is measured of the thoughts of a step, in sums that can be added up: any cut into micro-batches gives the same.

Sums are float64 and stay on the device until all of a step's are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from quietstar.data.batches import Batch
from quietstar.objective import LearnOutput

DECILES = 10


@dataclass(frozen=True)
class Means:
    """Several means by name.

    Args:
        names: M names.
        totals: float64 [M].
        counts: float64 [M], of how many things each total is the sum.
    """

    names: tuple[str, ...]
    totals: Tensor
    counts: Tensor

    def __add__(self, other: Means) -> Means:
        return Means(self.names, self.totals + other.totals, self.counts + other.counts)

    def tensors(self) -> dict[str, Tensor]:
        """The means as float64 scalars on the device; 0 where there was nothing."""
        return dict(zip(self.names, (self.totals / self.counts.clamp_min(1)).unbind(), strict=True))

    def floats(self) -> dict[str, float]:
        """The means, brought from the device together."""
        means: list[float] = (self.totals / self.counts.clamp_min(1)).tolist()
        return dict(zip(self.names, means, strict=True))


def text_targets(batch: Batch) -> Tensor:
    """bool [B, L-1]: where the next token belongs to the same document, and is one to learn."""
    mask = batch.attention_mask
    if mask is None:
        targets = torch.ones_like(batch.tokens[:, 1:], dtype=torch.bool)
    else:
        targets = (mask[:, 1:] == mask[:, :-1]) & (mask[:, 1:] > 0)
    return targets if batch.loss_mask is None else targets & batch.loss_mask[:, 1:]


def step_means(output: LearnOutput, batch: Batch) -> Means:
    """What thinking about a batch gives, NLLs and gains in nats.

    Args:
        output: Of the batch.
        batch: The texts.

    Returns:
        `text_nll`: NLL of the whole text without thought. Over the targets of the thoughts alone: `base_nll` without
        and `talk_nll` with thought, their difference `gain`, the three again by lookahead (`base_nll_0`, ...),
        `mixing_weight` and its square `mixing_weight_square`: the standard deviation is the root of the latter less the
        former squared. Over thoughts: `reward`, its absolute value `reward_size`, that of the advantage
        `advantage_size`; and per token `thought_logprob` at the policy temperature, and `thought_entropy`, the negative
        log-probability at the sampling temperature: an unbiased estimate of the entropy that thoughts are sampled with.
    """
    mask = output.target_mask
    thinking = mask.any(-1)
    per_target = torch.stack([output.base_nll_at_target, output.talk_nll, output.mixing_weight]).double()
    per_target = per_target.masked_fill(~mask, 0)
    base, talk, weight = per_target.sum((1, 2))  # [J]
    square = per_target[2].square().sum()
    per_thought = torch.stack(
        [
            output.reward,
            output.reward.abs(),
            output.advantage.abs(),
            output.thought_logprob.mean(-1),
            0 - output.thoughts.logprob.mean(-1),
        ]
    )
    per_thought = per_thought.double().masked_fill(~thinking, 0).sum((1, 2))  # [5]
    text = output.base_nll.double().sum()
    base_total, talk_total, weight_total = torch.stack([base, talk, weight]).sum(1).unbind()
    single = torch.stack([text, base_total, talk_total, base_total - talk_total, weight_total, square])

    lookahead = range(mask.shape[-1])
    targets = mask.sum((0, 1))  # [J]
    target_count = targets.sum().expand(5)
    thought_count = thinking.sum().expand(len(per_thought))
    text_count = text_targets(batch).sum()[None]
    return Means(
        (
            *("text_nll", "base_nll", "talk_nll", "gain", "mixing_weight", "mixing_weight_square"),
            *("reward", "reward_size", "advantage_size", "thought_logprob", "thought_entropy"),
            *(f"{name}_{j}" for name in ("base_nll", "talk_nll", "gain") for j in lookahead),
        ),
        torch.cat([single, per_thought, base, talk, base - talk]),
        torch.cat([text_count, target_count, thought_count, targets, targets, targets]).double(),
    )


def gain_by_difficulty(base_nll: Tensor, talk_nll: Tensor) -> dict[str, float]:
    """What thoughts gain on easy and on hard tokens.

    Args:
        base_nll: [N], NLL without thought of each target, in nats.
        talk_nll: [N], NLL after the thought.

    Returns:
        `gain_decile_0`, the mean gain of the tenth of the targets with the smallest NLL without thought, to
        `gain_decile_9`; tenths without a target are left out.
    """
    order = base_nll.argsort(stable=True)
    gain = (base_nll.double() - talk_nll.double())[order]
    edges = [len(gain) * edge // DECILES for edge in range(DECILES + 1)]
    tenths = [gain[first:end] for first, end in pairwise(edges)]
    return {f"gain_decile_{index}": float(tenth.mean()) for index, tenth in enumerate(tenths) if len(tenth)}
