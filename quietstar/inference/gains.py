"""What thinking gains at each position of texts, beside what is known there before thinking."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quietstar.errors import DataError
from quietstar.model import QuietStarForCausalLM
from quietstar.model.anchors import ENTROPY_CHUNK
from quietstar.model.padding import read_padding

STREAMS = 2048
"""Positions that think at once, which bounds the memory; for more of them the text is run again."""


@dataclass(frozen=True)
class Gains:
    """Positions of some texts whose next token is known. NLLs and entropy in nats, float32 [n].

    Args:
        hidden: [n, E] hidden states of the text without thought, after the final norm.
        base_nll: NLL of the next token without thought.
        talk_nll: The same after a greedy thought, of the prediction that `generate` draws from.
        entropy: Of the prediction without thought.
    """

    hidden: Tensor
    base_nll: Tensor
    talk_nll: Tensor
    entropy: Tensor

    @property
    def gain(self) -> Tensor:
        """log p(next token) with the thought minus without, float32 [n]."""
        return self.base_nll - self.talk_nll


@torch.no_grad()
def read_gains(
    model: QuietStarForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    positions: str = "all",
) -> Iterator[Gains]:
    """Thinks greedily at every position of a batch of texts and compares, some positions after the other.

    Args:
        model: On its device; the texts are moved there.
        input_ids: int64 [B, L].
        attention_mask: As in `QuietStarForCausalLM.think`.
        positions: `all`, `every:N` or `entropy:K`.

    Raises:
        ConfigError: Unknown positions.
        DataError: A tensor has a wrong shape, or an NLL is not finite.
    """
    device = model.head.weight.device
    ids = input_ids.to(device)
    mask = None if attention_mask is None else attention_mask.to(device)
    has_next = read_padding(ids, mask).has_next
    for anchors in model.choose_anchors(ids, mask, positions).split(max(1, STREAMS // len(ids)), dim=1):
        counted = has_next.gather(1, anchors.long())
        if not bool(counted.any()):
            continue
        _, hidden_base, hidden_thought, weight = model._end_thoughts(ids, mask, None, anchors, 1, True, 0)
        target = ids.gather(1, (anchors.long() + 1).clamp_max(ids.shape[1] - 1))
        gains = _compare(model, hidden_base[counted], hidden_thought[counted], weight[counted], target[counted])
        if not bool((gains.base_nll + gains.talk_nll).isfinite().all()):
            raise DataError(
                "input_ids: the NLL of a token is not finite, so there is no gain to measure; the weights of the model "
                "are damaged, or too large for their type"
            )
        yield gains


def _compare(
    model: QuietStarForCausalLM, hidden_base: Tensor, hidden_thought: Tensor, weight: Tensor, target: Tensor
) -> Gains:
    """[n, E], [n, E], [n] and [n], in chunks of rows that bound the logits."""
    head = model.head
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    rows = max(1, ENTROPY_CHUNK // head.weight.shape[0])
    for base, thought, share, token in zip(
        hidden_base.split(rows), hidden_thought.split(rows), weight.split(rows), target.split(rows), strict=True
    ):
        without = head.logits(base).float().log_softmax(-1)
        # the paper's mixture does not sum to one, and sampling from it normalises
        mixed = head.mixed_logits(base, thought, share, model.config.interpolation).float().log_softmax(-1)
        parts.append(
            (
                -without.gather(-1, token[:, None])[:, 0],
                -mixed.gather(-1, token[:, None])[:, 0],
                -(without.exp() * without).sum(-1),
            )
        )
    return Gains(hidden_base, *(torch.cat(columns) for columns in zip(*parts, strict=True)))
