"""What thinking returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quietstar.model.layers import LayerRecord


@dataclass(frozen=True)
class Recording:
    """A sampling pass kept for the differentiable forward (`learn(..., reuse_sampling_pass=True)`).

    Args:
        layers: Outputs of every decoder layer for the text and for whole streams.
        fingerprint: Identity and version of the weights that made it, and the settings that it depends on.
        inputs: What it was made from: input_ids, attention_mask, tokens, anchor.
    """

    layers: LayerRecord
    fingerprint: tuple[object, ...]
    inputs: tuple[Tensor | None, ...]

    def fits(self, fingerprint: tuple[object, ...], inputs: tuple[Tensor | None, ...]) -> bool:
        """Whether a pass with these weights and inputs would give the same outputs."""
        return fingerprint == self.fingerprint and all(map(_equal, inputs, self.inputs))


@dataclass(frozen=True)
class Thoughts:
    """Sampled thoughts.

    Args:
        tokens: int64 [B, P, T], the T sampled tokens of each of P streams per text.
        anchor: int32 [B, P], the text position that each stream hangs from, non-decreasing; the K thoughts of one
            position are neighbours.
        logprob: float32 [B, P, T], log-probability of each token at the sampling temperature, in nats.
        thoughts_per_position: K.
        temperature: The temperature that they were sampled at.
        recording: The sampling pass, where `think(record=True)` kept it.
    """

    tokens: Tensor
    anchor: Tensor
    logprob: Tensor
    thoughts_per_position: int
    temperature: float = 1.0
    recording: Recording | None = None


@dataclass(frozen=True)
class Prediction:
    """The next token's prediction at each stream's anchor, without and with the thought.

    Args:
        base_logits: float32 [B, P, V], without thought.
        talk_logits: float32 [B, P, V], mixed; where `interpolation="log_probs"` the paper's mixture of
            log-probabilities, which does not sum to one.
        mixing_weight: float32 [B, P], weight w of the thought.
        thoughts: The thoughts that were used.
    """

    base_logits: Tensor
    talk_logits: Tensor
    mixing_weight: Tensor
    thoughts: Thoughts


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    if left is right:
        return True
    return left is not None and right is not None and left.shape == right.shape and torch.equal(left, right)
