"""The loss of one training step: think, talk, learn.

`learn` is read first. The means of a loss are over the targets and thoughts of the texts at hand, or, given `Counts`,
over those of a whole optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quietstar.config.objective import Objective, resolve_objective
from quietstar.config.training import Replay
from quietstar.errors import ConfigError, DataError
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.model.padding import Padding, read_padding
from quietstar.model.passes import TalkStates
from quietstar.model.thoughts import Thoughts
from quietstar_kernels import linear_cross_entropy, mixed_cross_entropy

IGNORE = -100


@dataclass(frozen=True)
class LearnOutput:
    """Loss and measurements of one step. J = lookahead; NLLs in nats, float32; all but `loss` is detached.

    Args:
        loss: Total loss of the step, a differentiable scalar.
        base_loss: Mean NLL of the text without thought, a scalar.
        talk_loss: Mean NLL of the lookahead tokens after thoughts, a scalar.
        policy_loss: REINFORCE loss before its weight is applied, a scalar.
        base_nll: NLL of x[i+1] without thought, [B, L-1]; 0 where that is padding or begins another document.
        talk_nll: NLL of x[anchor+1+j] after the thought, [B, P, J]; 0 where there is no target.
        base_nll_at_target: NLL of the same targets without thought, [B, P, J]; 0 where there is no target.
        target_mask: Mask of the lookahead tokens that are targets, bool [B, P, J].
        mixing_weight: Mixing weight of the thought at each lookahead, [B, P, J].
        reward: Reward of each thought, [B, P]: sum over j of base_nll_at_target - talk_nll.
        advantage: Reward of each thought after baseline and clamping, [B, P].
        thought_logprob: Log-probability of each thought token at the policy temperature, [B, P, T].
        thoughts: Thoughts of the step, without their recording, which would stay in memory as long as this output.
    """

    loss: Tensor
    base_loss: Tensor
    talk_loss: Tensor
    policy_loss: Tensor
    base_nll: Tensor
    talk_nll: Tensor
    base_nll_at_target: Tensor
    target_mask: Tensor
    mixing_weight: Tensor
    reward: Tensor
    advantage: Tensor
    thought_logprob: Tensor
    thoughts: Thoughts


@dataclass(frozen=True)
class Counts:
    """Denominators of the three means of a loss.

    Args:
        text: Number of text tokens that have a target, float64 scalar.
        lookahead: Number of targets at each lookahead, float64 [J].
        thoughts: Number of thoughts that the REINFORCE loss is a mean over, float64 scalar.
    """

    text: Tensor
    lookahead: Tensor
    thoughts: Tensor

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.text + other.text, self.lookahead + other.lookahead, self.thoughts + other.thoughts)

    def of_part(self, share: float) -> Counts:
        """Return the denominators for a part with this share of the step's texts.

        The losses of the parts, each weighted with the share of the part, add up to the loss of the whole step.
        """
        return Counts(self.text * share, self.lookahead * share, self.thoughts * share)


def learn(
    model: QuietStarForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | Padding | None = None,
    *,
    thoughts: Thoughts | None = None,
    anchors: Tensor | str | None = None,
    objective: str | Objective = "default",
    seed: int = 0,
    first_text: int = 0,
    texts_in_step: int | None = None,
    counts: Counts | None = None,
    reuse_sampling_pass: bool = True,
    replay: Replay = "layers",
) -> LearnOutput:
    """Think, talk and learn on one batch (Quiet-STaR, section 4).

    Args:
        model: Thinking model that learns.
        input_ids: Token ids of the texts, int64 [B, L].
        attention_mask: Mask of the texts, [B, L], or their `Padding`, as in `QuietStarForCausalLM.think`; None: no
            padding. No loss crosses from one document to another.
        thoughts: Thoughts to learn from; None samples new ones.
        anchors: Positions that think, as in `QuietStarForCausalLM.think`; not together with `thoughts`.
        objective: Name of a preset, or an `Objective`.
        seed: Seed of the sampled thoughts.
        first_text, texts_in_step: Place of the first of these texts in a larger batch that they are part of, and the
            number of texts in the larger batch, as in `QuietStarForCausalLM.think`.
        counts: Denominators of the means, where these texts are part of a larger batch; None takes those of the texts.
            With them `loss_mean="nonzero"` counts targets, too.
        reuse_sampling_pass: Whether to take the forward of the differentiable pass from the sampling pass and recompute
            each layer once in the backward pass: exact gradients at the cost and memory of gradient checkpointing, with
            the sampling free. Otherwise the differentiable pass runs and keeps all of its activations.
        replay: What the recomputation takes from a sampling pass too: "layers", nothing; or a later stage of
            `training.replay`, for less time and more memory.

    Raises:
        ConfigError: The objective or `anchors` is unknown, `anchors` is given with `thoughts`, or there are fewer than
            two thoughts per position with a leave-one-out baseline.
        DataError: A tensor has a wrong shape, or the texts are shorter than two tokens.
    """
    if not hasattr(model, "think"):
        raise ConfigError(f"model: got a {type(model).__name__}, needs a QuietStarForCausalLM; from_base makes one")
    objective = resolve_objective(objective)
    padding = read_padding(input_ids, attention_mask, model.embedding)
    if input_ids.ndim == 2 and input_ids.shape[1] < 2:
        raise DataError(
            f"input_ids: got {input_ids.shape[1]} tokens, a text needs at least 2 to have something to predict"
        )
    reinforce = objective.policy_weight > 0 and model.config.thinking == "sample"
    count = thoughts.thoughts_per_position if thoughts is not None else model.config.thoughts_per_position
    if reinforce and objective.baseline == "leave_one_out" and count < 2:
        raise ConfigError(
            f"thoughts_per_position: got {count}, the leave_one_out baseline needs at least 2 "
            '(or set objective.baseline to "none")'
        )
    if thoughts is None:
        thoughts = model.think(
            input_ids,
            padding,
            anchors=anchors,
            seed=seed,
            first_text=first_text,
            texts_in_step=texts_in_step,
            record=reuse_sampling_pass,
            replay=replay,
        )
    elif anchors is not None:
        raise ConfigError("anchors: can't be given together with thoughts, which have their own")
    states = model.talk(input_ids, padding, thoughts, reuse_sampling_pass=reuse_sampling_pass, replay=replay)
    return _loss(model, states, input_ids, padding, thoughts, objective, reinforce, counts)


def _loss(
    model: QuietStarForCausalLM,
    states: TalkStates,
    input_ids: Tensor,
    padding: Padding,
    thoughts: Thoughts,
    objective: Objective,
    reinforce: bool,
    counts: Counts | None,
) -> LearnOutput:
    config, head = model.config, model.head
    head_options: dict[str, Any] = {"softcap": head.softcap, "logit_scale": head.logit_scale, "backend": config.backend}

    base_target = input_ids[:, 1:].masked_fill(~padding.has_next[:, :-1], IGNORE)
    base_loss, base_nll = _mean_loss(
        partial(
            linear_cross_entropy,
            states.text[:, :-1].flatten(0, 1),
            head.weight,
            base_target.flatten(),
            **head_options,
        ),
        padding.has_next[:, :-1, None],
        objective,
        None if counts is None else counts.text[None],
    )
    base_nll = base_nll.squeeze(-1)

    source, target_mask = lookahead_targets(padding, thoughts.anchor, config.lookahead)
    target = base_target.gather(1, source.flatten(1)).view(source.shape).masked_fill(~target_mask, IGNORE)
    hidden_base = _gather(states.text, source)
    hidden_thought = states.stream[:, :, config.thought_length + 1 :]
    weight = model.mixing_head(hidden_base, hidden_thought)
    talk_loss, talk_nll = _mean_loss(
        partial(
            mixed_cross_entropy,
            hidden_base.flatten(0, 2),
            hidden_thought.flatten(0, 2),
            weight.flatten(),
            head.weight,
            target.flatten(),
            interpolation=config.interpolation,
            **head_options,
        ),
        target_mask,
        objective,
        None if counts is None else counts.lookahead,
    )

    base_nll_at_target = base_nll.gather(1, source.flatten(1)).view(source.shape) * target_mask
    reward, advantage = _advantage(base_nll_at_target, talk_nll, thoughts, objective, states)
    if reinforce:
        counted = policy_thoughts(padding, thoughts.anchor, target_mask, objective)
        thoughts_counted = counted.sum() if counts is None else counts.thoughts
        temperature = thoughts.temperature if objective.policy_temperature is None else objective.policy_temperature
        policy_loss, nll = linear_cross_entropy(
            states.stream[:, :, : config.thought_length].flatten(0, 2),
            head.weight,
            thoughts.tokens.flatten(),
            row_weight=_policy_weight(advantage, thoughts, counted, thoughts_counted, objective).flatten(),
            temperature=temperature,
            banned=model.banned,
            **head_options,
        )
        logprob = -nll.view(thoughts.tokens.shape)
    else:
        logprob, policy_loss = thoughts.logprob, base_loss.new_zeros(())
    loss = objective.base_weight * base_loss + objective.talk_weight * talk_loss
    if reinforce:
        loss = loss + objective.policy_weight * policy_loss
    return LearnOutput(
        loss=loss,
        base_loss=base_loss.detach(),
        talk_loss=talk_loss.detach(),
        policy_loss=policy_loss.detach(),
        base_nll=base_nll,
        talk_nll=talk_nll,
        base_nll_at_target=base_nll_at_target,
        target_mask=target_mask,
        mixing_weight=weight.detach(),
        reward=reward,
        advantage=advantage,
        thought_logprob=logprob,
        thoughts=replace(thoughts, recording=None),
    )


def _gather(hidden: Tensor, index: Tensor) -> Tensor:
    """Gather the rows of `hidden`, [B, L, E], at `index`, [B, P, J]: [B, P, J, E]."""
    batch = torch.arange(hidden.shape[0], device=hidden.device)[:, None, None]
    return hidden[batch, index]


def _mean_loss(
    cross_entropy: Callable[..., Any], mask: Tensor, objective: Objective, count: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute the mean over the lookahead of the mean NLL of each lookahead's targets, 0 where it has none.

    Args:
        cross_entropy: Loss function of the kernels, with all arguments given except `row_weight`.
        mask: Mask of the targets, bool [..., J].
        objective: Objective, whose `loss_mean` says what is counted.
        count: Number of targets at each lookahead, [J]; None counts those of `mask`.

    Returns:
        The differentiable loss, and the NLLs [..., J] without a gradient.
    """
    if objective.loss_mean == "valid" or count is not None:
        # the share of each NLL in the loss is known beforehand, so the gradients need no second pass
        count = mask.flatten(0, -2).sum(0) if count is None else count
        share = mask.to(torch.float64) / (_no_zeros(count) * mask.shape[-1])
        loss, nll = cross_entropy(row_weight=share.flatten())
        return loss, nll.view(mask.shape)
    nll = cross_entropy().view(mask.shape)
    total, count = nll.flatten(0, -2).sum(0), (nll != 0).flatten(0, -2).sum(0)
    return (total / _no_zeros(count)).mean(), nll.detach()


def _no_zeros(count: Tensor) -> Tensor:
    """Replace denominators of 0, where there is nothing to divide, by 1. Others, shares of a step's, may be below 1."""
    return count.masked_fill(count == 0, 1)


def _advantage(
    base_nll: Tensor, talk_nll: Tensor, thoughts: Thoughts, objective: Objective, states: TalkStates
) -> tuple[Tensor, Tensor]:
    """Compute the reward and the advantage of each thought, [B, P] each."""
    if objective.reward_precision == "model":
        dtype = states.text.dtype
        base_nll, talk_nll = base_nll.to(dtype).to(base_nll.dtype), talk_nll.to(dtype).to(talk_nll.dtype)
    reward = (base_nll - talk_nll).sum(-1)
    count = thoughts.thoughts_per_position
    grouped = reward.unflatten(1, (-1, count))
    if objective.baseline != "none" and count > 1:
        grouped = grouped - grouped.mean(-1, keepdim=True)
        if objective.baseline == "leave_one_out":
            grouped = grouped * (count / (count - 1))
    advantage = grouped.flatten(1)
    return reward, advantage.clamp_min(0) if objective.clamp_negative_advantage else advantage


def _policy_weight(
    advantage: Tensor, thoughts: Thoughts, counted: Tensor, thoughts_counted: Tensor, objective: Objective
) -> Tensor:
    """Compute the weight of each thought token's NLL in the REINFORCE loss.

    The loss is the mean over thoughts of -advantage * log p(thought).

    Returns:
        Weights, [B, P, T].
    """
    weight = advantage * counted / _no_zeros(thoughts_counted)
    if objective.token_reduction == "mean":
        weight = weight / thoughts.tokens.shape[-1]
    return weight[..., None].expand(thoughts.tokens.shape)


def lookahead_targets(padding: Padding, anchor: Tensor, lookahead: int) -> tuple[Tensor, Tensor]:
    """Find where the predictions after thoughts are made, and which of them have a target.

    Lookahead j predicts x[anchor+1+j] from the text's state at anchor+j and the stream's after END and j true tokens.

    Args:
        padding: Padding of the texts.
        anchor: Text position that each stream starts from, int32 [B, P].
        lookahead: Number J of true tokens that each thought is judged by.

    Returns:
        The text position that lookahead j predicts from, int64 [B, P, J], kept inside the document and before the last
        token; and whether the prediction has a target, which is in the same document, bool [B, P, J].
    """
    length = padding.token_mask.shape[1]
    last = padding.last_at(anchor)[..., None]
    source = anchor.long()[..., None] + torch.arange(lookahead, device=anchor.device)
    inside = source < last
    source = torch.minimum(source, last).clamp_max(length - 2)
    has_next = padding.has_next.gather(1, source.flatten(1)).view(source.shape)
    return source, inside & has_next & padding.token_mask.gather(1, anchor.long())[..., None]


def policy_thoughts(padding: Padding, anchor: Tensor, target_mask: Tensor, objective: Objective) -> Tensor:
    """Return the thoughts that the REINFORCE loss is a mean over, bool [B, P]."""
    if objective.policy_positions == "valid":
        return target_mask.any(-1)
    return anchor < padding.last_at(anchor) - target_mask.shape[-1]


def count(padding: Padding, anchor: Tensor, lookahead: int, objective: Objective) -> Counts:
    """Count the targets and thoughts of texts.

    Args:
        padding: Padding of the texts.
        anchor: Text position that each stream starts from, int32 [B, P].
        lookahead: Number J of true tokens that each thought is judged by.
        objective: Objective, whose `policy_positions` says which thoughts are counted.
    """
    _, mask = lookahead_targets(padding, anchor, lookahead)
    return Counts(
        padding.has_next[:, :-1].sum().double(),
        mask.sum((0, 1)).double(),
        policy_thoughts(padding, anchor, mask, objective).sum().double(),
    )
