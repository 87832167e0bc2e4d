"""How many targets and thoughts the means of a loss are over: of the texts at hand, or of a whole optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quietstar.model.padding import Padding
from quietstar.objective.options import Objective


@dataclass(frozen=True)
class Counts:
    """Denominators of the three means.

    Args:
        text: float64 scalar, tokens of the text that have a target.
        lookahead: float64 [J], targets at each lookahead.
        thoughts: float64 scalar, thoughts that the REINFORCE loss is a mean over.
    """

    text: Tensor
    lookahead: Tensor
    thoughts: Tensor

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.text + other.text, self.lookahead + other.lookahead, self.thoughts + other.thoughts)

    def of_part(self, share: float) -> Counts:
        """Denominators for texts that are this share of a step's texts.

        Their means, weighted with the share, add up to the means of the whole step.
        """
        return Counts(self.text * share, self.lookahead * share, self.thoughts * share)


def lookahead_targets(padding: Padding, anchor: Tensor, lookahead: int) -> tuple[Tensor, Tensor]:
    """Where the predictions after thoughts are made, and which of them have a target.

    Lookahead j predicts x[anchor+1+j] from the text's state at anchor+j and the stream's after END and j true tokens.

    Args:
        padding: Of the texts.
        anchor: int32 [B, P].
        lookahead: J.

    Returns:
        The text position that lookahead j predicts from, int64 [B, P, J], kept inside of the document and before the
        last token; and bool [B, P, J], whether the next token is in the same document.
    """
    length = padding.token_mask.shape[1]
    last = padding.last_at(anchor)[..., None]
    source = anchor.long()[..., None] + torch.arange(lookahead, device=anchor.device)
    inside = source < last
    source = torch.minimum(source, last).clamp_max(length - 2)
    has_next = padding.has_next.gather(1, source.flatten(1)).view(source.shape)
    return source, inside & has_next & padding.token_mask.gather(1, anchor.long())[..., None]


def policy_thoughts(padding: Padding, anchor: Tensor, target_mask: Tensor, objective: Objective) -> Tensor:
    """bool [B, P]: the thoughts that the REINFORCE loss is a mean over."""
    if objective.policy_positions == "valid":
        return target_mask.any(-1)
    return anchor < padding.last_at(anchor) - target_mask.shape[-1]


def count(padding: Padding, anchor: Tensor, lookahead: int, objective: Objective) -> Counts:
    """The counts of some texts and the anchors of their thoughts, int32 [B, P]."""
    _, mask = lookahead_targets(padding, anchor, lookahead)
    return Counts(
        padding.has_next[:, :-1].sum().double(),
        mask.sum((0, 1)).double(),
        policy_thoughts(padding, anchor, mask, objective).sum().double(),
    )
