"""What one micro-batch and one evaluation compute, for each training method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from quietstar.config import ObjectiveOptions, TrainConfig
from quietstar.data.batches import Batch
from quietstar.model import QuietStarForCausalLM
from quietstar.objective import LearnOutput, Objective, resolve_objective
from quietstar.training.trainer import StepResult
from quietstar_kernels import linear_cross_entropy

ComputeStep = Callable[[QuietStarForCausalLM, Batch, int], StepResult]
Evaluate = Callable[[QuietStarForCausalLM], Mapping[str, float]]

EVALUATION_SEED = 1_234_567
"""Thoughts of every evaluation are sampled from here, so that two evaluations differ by the weights alone."""


def objective_of(options: ObjectiveOptions) -> Objective:
    """The preset with the overrides that are not None."""
    overrides = {name: value for name, value in asdict(options).items() if value is not None}
    return resolve_objective(overrides.pop("preset"), **overrides)


def compute_step(config: TrainConfig) -> ComputeStep:
    """The function that a `Trainer` calls for each micro-batch."""
    if config.training.method == "language_modeling":
        return language_modeling_step
    objective, positions = objective_of(config.objective), config.model.positions
    reuse = config.training.reuse_sampling_pass

    def step(model: QuietStarForCausalLM, batch: Batch, seed: int) -> StepResult:
        output = model.learn(
            batch.tokens,
            batch.attention_mask,
            anchors=positions,
            objective=objective,
            seed=seed,
            first_text=batch.first,
            texts_in_step=batch.step_size,
            reuse_sampling_pass=reuse,
        )
        return StepResult(output.loss, {**step_metrics(output), "policy_loss": output.policy_loss})

    return step


def language_modeling_step(model: QuietStarForCausalLM, batch: Batch, seed: int) -> StepResult:
    """Plain next-token loss of the base model, without thoughts.

    Args:
        model: The model whose `base` is trained.
        batch: Texts without padding.
        seed: Not used; nothing is random.
    """
    head, tokens = model.head, batch.tokens
    hidden = model.decoder(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    target = tokens[:, 1:].flatten()
    loss, _ = linear_cross_entropy(
        hidden,
        head.weight,
        target,
        row_weight=torch.full_like(target, 1 / target.numel(), dtype=torch.float64),
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        backend=model.config.backend,
    )
    return StepResult(loss, {"text_nll": loss.detach()})


def step_metrics(output: LearnOutput) -> dict[str, Tensor]:
    """What a step reports, NLLs and gains in nats.

    Returns:
        `text_nll`: mean NLL of the whole text without thought. Over the targets of the thoughts alone: `base_nll`
        without and `talk_nll` with thought, their difference `gain`, and `gain_0`, `gain_1`, ... by lookahead;
        `mixing_weight`. Over thoughts: `reward`, its mean absolute value `reward_size`, and `thought_logprob` (per
        token).
    """
    mask = output.target_mask
    count = mask.sum().clamp_min(1)
    thinking = mask.any(-1)
    thoughts = thinking.sum().clamp_min(1)
    base = (output.base_nll_at_target * mask).sum() / count
    talk = (output.talk_nll * mask).sum() / count
    metrics = {
        "text_nll": output.base_loss,
        "base_nll": base,
        "talk_nll": talk,
        "gain": base - talk,
        "reward": (output.reward * thinking).sum() / thoughts,
        "reward_size": (output.reward.abs() * thinking).sum() / thoughts,
        "mixing_weight": (output.mixing_weight * mask).sum() / count,
        "thought_logprob": (output.thought_logprob.mean(-1) * thinking).sum() / thoughts,
    }
    for j in range(mask.shape[-1]):
        gain = (output.base_nll_at_target - output.talk_nll)[..., j] * mask[..., j]
        metrics[f"gain_{j}"] = gain.sum() / mask[..., j].sum().clamp_min(1)
    return metrics


def evaluate_on(texts: Tensor, config: TrainConfig) -> Evaluate:
    """A function that measures a model on held-out texts.

    Args:
        texts: int64 [n, L]; the first `training.eval_batches` batches are used.

    Returns:
        For a model: `loss` (what is minimised: the talk NLL, or the plain NLL for language modelling), and the means of
        `step_metrics` with thoughts from a fixed seed.
    """
    size = config.training.micro_batch_size or config.training.batch_size
    count = config.training.eval_batches * config.training.batch_size
    batches = [Batch(part, None, ()) for part in texts[:count].split(size)]
    objective, positions = objective_of(config.objective), config.model.positions

    @torch.no_grad()
    def evaluate(model: QuietStarForCausalLM) -> dict[str, float]:
        totals: dict[str, float] = {}
        device = next(model.parameters()).device
        for index, batch in enumerate(batches):
            part = batch.to(device)
            if config.training.method == "language_modeling":
                metrics = dict(language_modeling_step(model, part, 0).metrics)
                metrics["loss"] = metrics["text_nll"]
            else:
                output = model.learn(
                    part.tokens,
                    part.attention_mask,
                    anchors=positions,
                    objective=objective,
                    seed=EVALUATION_SEED + index,
                    reuse_sampling_pass=False,
                )
                metrics = {**step_metrics(output), "loss": output.talk_loss}
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(batch)
        return {name: total / sum(len(batch) for batch in batches) for name, total in totals.items()}

    return evaluate
