"""One Quiet-STaR training step the direct way: what `train_step.py` measures the engine against.

This is the step of arXiv 2403.09629 and its released code, on a plain transformers model and in plain PyTorch:

* every text is repeated K times, so the text pass runs K times on identical text;
* the thought streams of all positions advance one token per forward pass, S passes after the text pass, through
  a cache whose keys and values grow by `torch.cat`, every pass kept in autograd;
* attention is SDPA under one dense additive mask that grows by an [L, L] diagonal block per pass;
* whole [B*K*L, V] logits, for sampling (raw) and for the losses (mixed).

It is not made slow on purpose. Where the released code is wasteful without changing the method, this one is not: tokens
are embedded by lookup instead of a one-hot product, the mask is shared by the batch when nothing is padded, raw logits
are computed only where a token is sampled, and targets are masked instead of copying sliced logits. One waste of the
released code is a switch: it computes, and keeps, a mixed prediction and its loss at *every* pass, also at START and at
the thought tokens, whose loss is then thrown away. `intermediate_predictions=False` leaves those out; the benchmark
reports both.

Shapes: B texts, K thoughts per position, R = B*K rows (the K of a text adjacent), L text length, T thought tokens,
J lookahead tokens, S = T + 2 + J - 1 stream passes, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from quietstar.model.upstream import CACHE

IGNORED = -100


@dataclass(frozen=True)
class NaiveObjective:
    """The few numbers in which the loss of the released code and the engine's default differ.

    The loss is `base_weight * mean NLL_base + talk_weight * mean_j mean NLL_talk_j + policy_weight * policy`, where
    `policy = mean_t mean_(row, position) -advantage * log p(thought token t)` (`token_reduction="sum"`: sum over t).
    """

    base_weight: float = 0.5
    talk_weight: float = 0.5
    policy_weight: float = 1e6
    baseline: Literal["mean", "leave_one_out"] = "mean"
    clamp_negative_advantage: bool = True
    policy_temperature: float = 3.0
    token_reduction: Literal["mean", "sum"] = "mean"
    # "released": positions that can see all J targets, less one, padding included. "valid": every one with a target.
    policy_positions: Literal["released", "valid"] = "released"
    # "nonzero": a mean divides by the number of losses that are not exactly zero. "valid": by the number of targets.
    loss_mean: Literal["nonzero", "valid"] = "nonzero"


RELEASED = NaiveObjective()
OBJECTIVES = {
    "authors": RELEASED,
    "default": NaiveObjective(
        policy_weight=1.0,
        baseline="leave_one_out",
        clamp_negative_advantage=False,
        policy_temperature=1.0,
        token_reduction="sum",
        policy_positions="valid",
        loss_mean="valid",
    ),
}
"""By the names of the engine's presets."""


@dataclass
class NaiveStep:
    """What one step gives. Losses are scalars in the graph; the rest is there to be compared.

    Attributes:
        loss, base_loss, talk_loss, policy_loss: scalar float32.
        base_nll: [R, L-1], of x[i+1] without thought; 0 where the target is padding.
        talk_nll: J tensors [R, L-1-j], of x[i+1+j] after the thought at i; 0 where the target is padding.
        intermediate_nll: T + 1 tensors [R, L-1] of x[i+1] at START and at each thought token; empty where left out.
        mixing_weight: S tensors [R, L] (J where intermediate predictions are left out).
        reward: [R, L-1], the sum over j of base NLL minus talk NLL of the same targets.
        advantage: [R, positions of the policy term].
        thought_logprob: [R, L, T] at `policy_temperature`.
        thought_tokens: int64 [R, L, T].
    """

    loss: Tensor
    base_loss: Tensor
    talk_loss: Tensor
    policy_loss: Tensor
    base_nll: Tensor
    talk_nll: list[Tensor]
    intermediate_nll: list[Tensor]
    mixing_weight: list[Tensor]
    reward: Tensor
    advantage: Tensor
    thought_logprob: Tensor
    thought_tokens: Tensor


def naive_step(
    base: PreTrainedModel,
    mixing_head: nn.Module,
    start: Tensor,
    end: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    thoughts_per_position: int,
    thought_length: int,
    lookahead: int,
    objective: NaiveObjective = RELEASED,
    thought_tokens: Tensor | None = None,
    banned: Sequence[int] = (),
    window: int | None = None,
    intermediate_predictions: bool = True,
    generator: torch.Generator | None = None,
) -> NaiveStep:
    """One forward of the training step, everything in autograd.

    Args:
        base: a causal LM with `get_decoder()` and `get_output_embeddings()`, attention "sdpa" (or "eager").
        mixing_head: [..., 2E] (text state, thought state) -> [..., 1], the weight of the thought.
        start, end: [E], the learned thought delimiters.
        input_ids: int64 [B, L].
        attention_mask: [B, L], 1 for text; None where nothing is padded.
        thought_tokens: int64 [R, L, T] to use in place of sampled ones.
        banned: ids that a thought may not contain.
        window: a text key j is visible from position i where i - j < window.
        intermediate_predictions: see the module's docstring.
        generator: source of the sampling noise.
    """
    decoder, lm_head = base.get_decoder(), base.get_output_embeddings()
    embed = base.get_input_embeddings()
    text = input_ids.repeat_interleave(thoughts_per_position, dim=0)
    keep = None if attention_mask is None else attention_mask.repeat_interleave(thoughts_per_position, dim=0).bool()
    rows, length = text.shape
    vocabulary = lm_head.weight.shape[0]

    text_block, own_block = mask_blocks(length, keep, window, start.dtype, text.device)
    mask = text_block
    positions = torch.arange(length, device=text.device).expand(rows, length)
    # Built without the model's config on purpose: with it, a sliding-window model gets a cache that forgets thoughts.
    cache = DynamicCache()

    def advance(embeddings: Tensor, position_ids: Tensor) -> Tensor:
        """One pass of all rows and positions; [R, L, E] in, final hidden states [R, L, E] out."""
        return decoder(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=True,
            **{CACHE: cache},
        ).last_hidden_state

    def nll(logits: Tensor, ahead: int) -> Tensor:
        """-log p of x[i+ahead] from logits [R, L, V] at i -> [R, L-ahead], 0 where that token is padding."""
        target = torch.full_like(text, IGNORED)
        target[:, : length - ahead] = text[:, ahead:]
        if keep is not None:
            target[:, : length - ahead].masked_fill_(~keep[:, ahead:], IGNORED)
        flat = F.cross_entropy(logits.view(-1, vocabulary), target.view(-1), ignore_index=IGNORED, reduction="none")
        return flat.view(rows, length)[:, : length - ahead]

    hidden_text = advance(embed(text), positions)
    base_nll = nll(lm_head(hidden_text), 1)

    mixing_weight: list[Tensor] = []

    def mixed_nll(hidden_stream: Tensor, lookahead_step: int) -> Tensor:
        hidden_base = hidden_text.roll(-lookahead_step, dims=1)
        weight = mixing_head(torch.cat([hidden_base, hidden_stream], dim=-1))
        mixing_weight.append(weight.squeeze(-1))
        logits = lm_head((1 - weight) * hidden_base + weight * hidden_stream)
        return nll(logits, 1 + lookahead_step)

    talk_nll: list[Tensor] = []
    intermediate_nll: list[Tensor] = []
    thought_logprob: list[Tensor] = []
    used_tokens: list[Tensor] = []
    embeddings = start.expand(rows, length, -1)
    for stream_index in range(thought_length + 2 + lookahead - 1):
        mask = torch.cat([mask, own_block], dim=-1)
        hidden_stream = advance(embeddings, positions + 1 + stream_index)
        lookahead_step = stream_index - (thought_length + 1)
        if lookahead_step >= 0:
            talk_nll.append(mixed_nll(hidden_stream, lookahead_step))
        elif intermediate_predictions:
            intermediate_nll.append(mixed_nll(hidden_stream, 0))

        if stream_index < thought_length:
            logits = lm_head(hidden_stream)
            if banned:
                logits[..., list(banned)] = torch.finfo(logits.dtype).min
            token = sample(logits, generator) if thought_tokens is None else thought_tokens[:, :, stream_index]
            used_tokens.append(token)
            thought_logprob.append(
                -F.cross_entropy(
                    logits.view(-1, vocabulary) / objective.policy_temperature, token.reshape(-1), reduction="none"
                ).view(rows, length)
            )
            embeddings = embed(token)
        elif stream_index == thought_length:
            embeddings = end.expand(rows, length, -1)
        else:
            embeddings = embed(text.roll(-(lookahead_step + 1), dims=1))

    return objective_of(
        objective,
        thoughts_per_position,
        keep,
        base_nll,
        talk_nll,
        intermediate_nll,
        mixing_weight,
        torch.stack(thought_logprob, dim=-1),
        torch.stack(used_tokens, dim=-1),
    )


def mask_blocks(
    length: int, keep: Tensor | None, window: int | None, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The additive mask of the text pass and the block that each stream pass appends, both [R or 1, 1, L, L]."""
    i = torch.arange(length, device=device)[:, None]
    j = torch.arange(length, device=device)[None, :]
    visible = j <= i
    if window is not None:
        visible = visible & (i - j < window)
    visible = visible[None, None]
    if keep is not None:
        visible = visible & keep[:, None, None, :]
    own = visible & (i == j)

    def additive(allowed: Tensor) -> Tensor:
        # The lowest finite number rather than -inf: a row that sees nothing (padding) must not become NaN.
        return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, torch.finfo(dtype).min)

    return additive(visible), additive(own)


def sample(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw from softmax(logits) by the exponential race: [R, L, V] -> int64 [R, L]."""
    with torch.no_grad():
        race = torch.empty_like(logits).exponential_(generator=generator)
        return (logits.softmax(dim=-1) / race).argmax(dim=-1)


def objective_of(
    objective: NaiveObjective,
    thoughts_per_position: int,
    keep: Tensor | None,
    base_nll: Tensor,
    talk_nll: list[Tensor],
    intermediate_nll: list[Tensor],
    mixing_weight: list[Tensor],
    thought_logprob: Tensor,
    thought_tokens: Tensor,
) -> NaiveStep:
    """Put the loss together from per-token terms; shapes as in `NaiveStep`."""
    positions = base_nll.shape[1]
    lookahead = len(talk_nll)
    is_target = torch.ones_like(base_nll, dtype=torch.bool) if keep is None else keep[:, 1:]

    def mean(values: Tensor, ahead: int) -> Tensor:
        count = values.count_nonzero() if objective.loss_mean == "nonzero" else is_target[:, ahead:].sum()
        return values.sum() / count

    base_loss = mean(base_nll, 0)
    talk_loss = torch.stack([mean(values, j) for j, values in enumerate(talk_nll)]).mean()

    gains = [base_nll[:, j:].detach() - values.detach() for j, values in enumerate(talk_nll)]
    reward = torch.stack([F.pad(gain, (0, j)) for j, gain in enumerate(gains)]).sum(0)

    used = positions - lookahead if objective.policy_positions == "released" else positions
    if used < 1:
        raise ValueError(f"text of {positions + 1} tokens is too short for a lookahead of {lookahead}")
    per_text = reward[:, :used].unflatten(0, (-1, thoughts_per_position))
    advantage = per_text - per_text.mean(dim=1, keepdim=True)
    if objective.baseline == "leave_one_out":
        advantage = advantage * (thoughts_per_position / (thoughts_per_position - 1))
    if objective.clamp_negative_advantage:
        advantage = advantage.clamp(min=0)
    advantage = advantage.flatten(0, 1)

    surrogate = -advantage[..., None] * thought_logprob[:, :used]
    surrogate = surrogate.mean(-1) if objective.token_reduction == "mean" else surrogate.sum(-1)
    if objective.policy_positions == "released":
        policy_loss = surrogate.mean()
    else:
        policy_loss = (surrogate * is_target).sum() / is_target.sum()

    loss = objective.base_weight * base_loss + objective.talk_weight * talk_loss + objective.policy_weight * policy_loss
    return NaiveStep(
        loss=loss,
        base_loss=base_loss,
        talk_loss=talk_loss,
        policy_loss=policy_loss,
        base_nll=base_nll,
        talk_nll=talk_nll,
        intermediate_nll=intermediate_nll,
        mixing_weight=mixing_weight,
        reward=reward,
        advantage=advantage,
        thought_logprob=thought_logprob,
        thought_tokens=thought_tokens,
    )
