"""Thoughts and predictions, as `think` and `predict` return them, and the text positions that thoughts start from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quietstar.config.options import parse_positions
from quietstar.errors import DataError
from quietstar.model.layers import LayerRecord
from quietstar.model.padding import Padding
from quietstar.model.thinking_model import OutputHead

ENTROPY_CHUNK = 1 << 24
"""Elements of a float32 logits chunk while entropies are computed (64 MiB)."""
INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Recording:
    """A sampling pass, kept for the differentiable forward (`learn(..., reuse_sampling_pass=True)`).

    Args:
        layers: Outputs of every decoder layer for the text and for whole streams.
        fingerprint: Identity and version of the weights that made the pass, and the settings that it depends on.
        inputs: Inputs of the pass: input_ids, attention_mask, tokens, anchor.
    """

    layers: LayerRecord
    fingerprint: tuple[object, ...]
    inputs: tuple[Tensor | None, ...]

    def fits(self, fingerprint: tuple[object, ...], inputs: tuple[Tensor | None, ...]) -> bool:
        """Return whether a pass with these weights and inputs would give the same outputs."""
        return fingerprint == self.fingerprint and all(map(_equal, inputs, self.inputs))


@dataclass(frozen=True)
class Thoughts:
    """Sampled thoughts.

    Args:
        tokens: Token ids of the thoughts, int64 [B, P, T]: T sampled tokens for each of P streams per text.
        anchor: Text position that each stream starts from, int32 [B, P], non-decreasing; the K thoughts of one
            position are neighbours.
        logprob: Log-probability of each token at the sampling temperature, in nats, float32 [B, P, T].
        thoughts_per_position: Number K of thoughts at each position.
        temperature: Sampling temperature of the tokens.
        recording: Recorded sampling pass, where `think(record=True)` kept it.
    """

    tokens: Tensor
    anchor: Tensor
    logprob: Tensor
    thoughts_per_position: int
    temperature: float = 1.0
    recording: Recording | None = None

    def check(self, input_ids: Tensor, thought_length: int, lowest: int, vocabulary: int) -> None:
        """Check that these thoughts fit a batch of texts.

        Args:
            input_ids: Token ids of the texts, int64 [B, L].
            thought_length: Number T of tokens in a thought of the model.
            lowest: Smallest allowed token id: 0, or `PAUSE` where the model pauses.
            vocabulary: Number of tokens that the model knows.

        Raises:
            DataError: A shape, an anchor or a token id does not fit.
        """
        streams = self.anchor.shape[-1]
        wanted = (input_ids.shape[0], streams, thought_length)
        if self.tokens.shape != wanted or self.anchor.shape != wanted[:2]:
            raise DataError(
                f"thoughts: got tokens {list(self.tokens.shape)} and anchors {list(self.anchor.shape)}, "
                f"needs tokens {list(wanted)} (texts, streams, T) and anchors {list(wanted[:2])}"
            )
        count, length = self.thoughts_per_position, input_ids.shape[1]
        if streams % count:
            raise DataError(f"thoughts: {streams} streams are not a multiple of {count} a position")
        if not streams:
            return
        anchor, tokens = self.anchor, self.tokens
        grouped = anchor.unflatten(1, (-1, count))
        disordered = (grouped != grouped[..., :1]).any() | (anchor[:, 1:] < anchor[:, :-1]).any()
        wrong, low, high = torch.stack([disordered, *anchor.aminmax()]).tolist()  # one wait for the device
        if wrong:
            raise DataError(f"thoughts: anchors must not decrease, the {count} thoughts of a position side by side")
        if low < 0 or high >= length:
            raise DataError(f"thoughts: got anchors {low}..{high}, needs positions in the text, 0..{length - 1}")
        low, high = torch.stack(tokens.aminmax()).tolist()
        if low < lowest or high >= vocabulary:
            raise DataError(f"thoughts: got tokens {low}..{high}, needs {lowest}..{vocabulary - 1}")


@dataclass(frozen=True)
class Prediction:
    """The next token's prediction at each stream's anchor, without and with the thought.

    Args:
        base_logits: Logits without thought, float32 [B, P, V].
        talk_logits: Logits with the thought mixed in, float32 [B, P, V]; with `interpolation="log_probs"` the paper's
            mixture of log-probabilities, whose probabilities do not sum to 1.
        mixing_weight: Mixing weight w of the thought, float32 [B, P].
        thoughts: Thoughts that the predictions were made after.
    """

    base_logits: Tensor
    talk_logits: Tensor
    mixing_weight: Tensor
    thoughts: Thoughts


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    if left is right:
        return True
    return left is not None and right is not None and left.shape == right.shape and torch.equal(left, right)


def expand_anchors(
    anchors: Tensor | str | None, padding: Padding, base_entropy: Tensor | None, thoughts_per_position: int
) -> Tensor:
    """Return the anchor of every stream.

    Their number follows from L and `anchors` alone, so that the random numbers of a text do not depend on its batch.
    Anchors in padding and at the end of a document have nothing to learn from; they fill rows that have too few others.

    Args:
        anchors: Positions that think: None or "all" for every position but the last, a string of `parse_positions`, or
            integers [A] or [B, A]. "every:N" counts from the first token of each document; where a row has more than
            ceil((L - 1) / N) such positions, this many of them are taken, evenly spaced. A fraction K of "entropy:K" is
            one of L - 1.
        padding: Padding of the batch.
        base_entropy: Entropy of the base prediction at each position, [B, L]; needed only for "entropy:K".
        thoughts_per_position: Number K of streams for each anchor.

    Returns:
        Anchors, int32 [B, P] with P = A*K, non-decreasing in each row.

    Raises:
        ConfigError: `anchors` is an unknown string.
        DataError: `anchors` has a wrong dtype or shape, or lies outside the text.
    """
    batch, length = padding.token_mask.shape
    device = padding.token_mask.device
    if anchors is None or isinstance(anchors, str):
        kind, value = parse_positions("all" if anchors is None else anchors)
        last = max(length - 1, 1)  # nothing follows the last token, so its thought has nothing to learn from
        if kind == "entropy":
            assert base_entropy is not None
            count = min(last, max(1, round(value * last) if value < 1 else int(value)))
            ranked = base_entropy[:, :last].masked_fill(~padding.has_next[:, :last], -1.0)
            chosen = ranked.topk(count, dim=1).indices.sort(dim=1).values
        else:
            chosen = torch.arange(0, last, int(value), device=device)
            if value > 1:
                chosen = _every(int(value), chosen, padding)
    else:
        try:
            chosen = torch.as_tensor(anchors, device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"anchors: got {anchors!r}, needs integers [A] or [{batch}, A] ({error})") from None
        if not chosen.numel():
            raise DataError("anchors: got none, needs at least one position that thinks")
        if chosen.ndim not in (1, 2) or (chosen.ndim == 2 and chosen.shape[0] != batch) or chosen.dtype not in INTEGERS:
            raise DataError(
                f"anchors: got {chosen.dtype} of shape {list(chosen.shape)}, needs integers [A] or [{batch}, A]"
            )
        low, high = torch.stack(chosen.aminmax()).tolist()
        if low < 0 or high >= length:
            raise DataError(f"anchors: got {low}..{high}, needs positions in the text, 0..{length - 1}")
        chosen = chosen.sort(dim=-1).values
    return chosen.to(torch.int32).expand(batch, -1).repeat_interleave(thoughts_per_position, dim=1).contiguous()


def _every(step: int, chosen: Tensor, padding: Padding) -> Tensor:
    """Return every step-th position of each document, [B, A].

    Args:
        step: Distance between two positions, in tokens.
        chosen: Every step-th position of a row, [A].
        padding: Padding of the batch.
    """
    length = padding.token_mask.shape[1]
    first = padding.token_mask.int().argmax(1, keepdim=True)
    of_text = (chosen + first % step).clamp_max(length - 1)
    if padding.start is None or padding.start.ndim == 1:
        return of_text
    found = (padding.has_next & (padding.position_ids % step == 0)).cumsum(1)  # [B, L]
    total, count = found[:, -1:], len(chosen)
    rank = torch.arange(count, device=found.device).expand(len(found), -1)
    rank = torch.where(total > count, rank * total // count, rank) + 1
    of_documents = torch.searchsorted(found, rank).clamp_max(length - 1)
    return torch.where(padding.start[:, :1] == padding.start[:, -1:], of_text, of_documents)


def base_entropy(hidden: Tensor, head: OutputHead) -> Tensor:
    """Compute the entropy in nats of the prediction from each hidden state, in chunks of rows.

    Args:
        hidden: Hidden states after the final norm, [B, L, E].
        head: Output head of the base model.

    Returns:
        Entropies, float32 [B, L].
    """
    parts = []
    for rows in hidden.flatten(0, 1).split(max(1, ENTROPY_CHUNK // head.weight.shape[0])):
        logprobs = head.logits(rows).float().log_softmax(-1)
        parts.append(-(logprobs.exp() * logprobs).sum(-1))
    return torch.cat(parts).view(hidden.shape[:-1])
