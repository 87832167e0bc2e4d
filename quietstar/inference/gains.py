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
from quietstar.model.passes import CachedPass

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
        text: Row of the batch, int64 [n].
    """

    hidden: Tensor
    base_nll: Tensor
    talk_nll: Tensor
    entropy: Tensor
    text: Tensor

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
    ids, mask = _on_device(model, input_ids, attention_mask)
    for anchors, counted in _pieces(model, ids, mask, positions):
        _, hidden_base, hidden_thought, weight = model._end_thoughts(ids, mask, None, anchors, 1, True, 0)
        target = ids.gather(1, (anchors.long() + 1).clamp_max(ids.shape[1] - 1))
        nlls = _compare(model, hidden_base[counted], hidden_thought[counted], weight[counted], target[counted])
        gains = Gains(hidden_base[counted], *nlls, text=counted.nonzero()[:, 0])
        if not bool((gains.base_nll + gains.talk_nll).isfinite().all()):
            raise DataError(
                "input_ids: the NLL of a token is not finite, so there is no gain to measure; the weights of the model "
                "are damaged, or too large for their type"
            )
        yield gains


@torch.no_grad()
def read_states(
    model: QuietStarForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    positions: str = "all",
) -> Iterator[Tensor]:
    """`Gains.hidden` of `read_gains` in the same order, for the cost of the base alone: nothing is thought.

    Args:
        model: On its device; the texts are moved there.
        input_ids: int64 [B, L].
        attention_mask: As in `QuietStarForCausalLM.think`.
        positions: `all`, `every:N` or `entropy:K`.
    """
    ids, mask = _on_device(model, input_ids, attention_mask)
    pieces = _pieces(model, ids, mask, positions)
    hidden = CachedPass(model, ids, read_padding(ids, mask), False).text_hidden
    for anchors, counted in pieces:
        row, column = counted.nonzero(as_tuple=True)
        yield hidden[row, anchors.long()[row, column]]


def _on_device(
    model: QuietStarForCausalLM, input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    device = model.head.weight.device
    return input_ids.to(device), None if attention_mask is None else attention_mask.to(device)


def _pieces(
    model: QuietStarForCausalLM, ids: Tensor, mask: Tensor | None, positions: str
) -> list[tuple[Tensor, Tensor]]:
    """Anchors [B, some], as many as think at once, and which of them have a next token."""
    has_next = read_padding(ids, mask).has_next
    pieces = model.choose_anchors(ids, mask, positions).split(max(1, STREAMS // len(ids)), dim=1)
    found = [(anchors, has_next.gather(1, anchors.long())) for anchors in pieces]
    return [(anchors, counted) for anchors, counted in found if bool(counted.any())]


def _compare(
    model: QuietStarForCausalLM, hidden_base: Tensor, hidden_thought: Tensor, weight: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`base_nll`, `talk_nll` and `entropy` from [n, E], [n, E], [n] and [n], in chunks that bound the logits."""
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
    base_nll, talk_nll, entropy = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return base_nll, talk_nll, entropy
