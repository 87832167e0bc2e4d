"""The functions that compute one micro-batch and one evaluation, for each training method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import reduce
from operator import add

import torch
from torch import Tensor

from quietstar.config.objective import Objective, objective_of
from quietstar.config.training import TrainConfig, replay_stage
from quietstar.data.batches import Batch
from quietstar.model.attention import ThoughtPass
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.model.padding import read_padding
from quietstar.model.sharding import call, own_part
from quietstar.objective.learning import IGNORE, Counts, LearnOutput, count, learn
from quietstar.training.ranks import ALONE, Ranks
from quietstar.training.step import Means, StepResult, gain_by_difficulty, step_means, text_targets
from quietstar_kernels import linear_cross_entropy

ComputeStep = Callable[[QuietStarForCausalLM, Batch, int], StepResult]
Evaluate = Callable[[QuietStarForCausalLM], Mapping[str, float]]

EVALUATION_SEED = 1_234_567
"""Seed of the thoughts of every evaluation, so that two evaluations differ only by the weights."""


def compute_step(config: TrainConfig) -> ComputeStep:
    """Returns the function that a `Trainer` calls for each micro-batch; the metrics are those of `step_means`."""
    if config.training.method == "language_modeling":
        return language_modeling_step
    objective = objective_of(config.objective)
    counts = StepDenominators(config, objective)

    def step(model: QuietStarForCausalLM, batch: Batch, seed: int) -> StepResult:
        output = _learn(model, batch, config, objective, seed, config.training.reuse_sampling_pass, counts)
        return StepResult(output.loss, {"policy_loss": output.policy_loss}, means=step_means(output, batch))

    return step


class StepDenominators:
    """The denominators of a whole optimizer step, for its micro-batches.

    With them the gradients of the micro-batches add up to those of the undivided step.

    Args:
        config: Configuration of the run.
        objective: Objective of the run, which says what is counted.
    """

    def __init__(self, config: TrainConfig, objective: Objective) -> None:
        self._positions = config.model.positions
        self._objective = objective
        self._step: Batch | None = None
        self._counts: Counts | None = None

    def of(self, model: QuietStarForCausalLM, batch: Batch) -> Counts | None:
        """Returns the denominators for one micro-batch.

        None where the micro-batch's own counts are right: it is the whole step, or all texts have equal counts.
        """
        whole = batch.step
        chosen_by_model = self._positions.startswith("entropy")
        if whole is None or len(whole) == len(batch) or (batch.attention_mask is None and not chosen_by_model):
            return None
        if whole is not self._step or self._counts is None:
            device = batch.tokens.device
            parts = (whole.part(first, len(batch)).to(device) for first in range(0, len(whole), len(batch)))
            self._step, self._counts = whole, reduce(add, (self._count(model, part) for part in parts))
        return self._counts.of_part(len(batch) / len(whole))

    def _count(self, model: QuietStarForCausalLM, part: Batch) -> Counts:
        padding = read_padding(part.tokens, part.attention_mask)
        anchor = model.choose_anchors(part.tokens, padding, self._positions)
        anchor = anchor.repeat_interleave(model.config.thoughts_per_position, dim=1)
        return count(padding, anchor, model.config.lookahead, self._objective)


def language_modeling_step(model: QuietStarForCausalLM, batch: Batch, seed: int) -> StepResult:
    """Computes the plain next-token loss of the base model, without thoughts.

    Args:
        model: Thinking model whose `base` is trained.
        batch: Texts of the micro-batch; where a text holds several documents, none sees another.
        seed: Seed of the step; not used, because nothing is random.
    """
    loss, _ = _text_loss(model, batch)
    return StepResult(loss, {"text_nll": loss.detach()}, _weight(batch))


def evaluate_on(
    texts: Tensor, config: TrainConfig, attention_mask: Tensor | None = None, ranks: Ranks = ALONE
) -> Evaluate:
    """Returns a function that measures a model on held-out texts.

    Args:
        texts: Token ids of the held-out texts, int64 [n, L]; the first `training.eval_batches` batches are used.
        config: Configuration of the run; `training.micro_batch_size` may change between evaluations.
        attention_mask: Document numbers of the tokens, 0 at padding, int64 [n, L]; None: one document each, unpadded.
        ranks: Processes of the run; each measures its share of the texts.

    Returns:
        A function of a model that returns its metrics: `loss` (the talk NLL, or the plain NLL for language modelling),
        the means of `step_means` with thoughts from a fixed seed, `mixing_weight_deviation` (standard deviation),
        `gain_by_difficulty`, and for the first batch `gradient_norm_lm` and `gradient_norm_policy`: the 2-norms of the
        gradients of the two parts of the loss, with their weights in the loss. Nothing depends on the micro-batch size.
    """
    training, objective = config.training, objective_of(config.objective)
    batches = [
        Batch(
            texts[first : first + training.batch_size],
            None if attention_mask is None else attention_mask[first : first + training.batch_size],
            (),
        )
        for first in range(0, len(texts), training.batch_size)
    ][: training.eval_batches]

    @torch.no_grad()
    def evaluate(model: QuietStarForCausalLM) -> dict[str, float]:
        device = next(model.parameters()).device
        means: list[Means] = []
        targets: list[Tensor] = []
        for index, batch in enumerate(batches):
            for part, counts in _parts(batch, config, device, ranks):
                if training.method == "language_modeling":
                    measured = call(model, _text_means, part)
                else:
                    seed = EVALUATION_SEED + index
                    output = call(model, _learn, part, config, objective, seed, reuse_sampling_pass=False)
                    measured = step_means(output, part)
                    nlls = torch.stack([output.base_nll_at_target, output.talk_nll], -1)
                    targets.append(nlls[output.target_mask if counts else output.target_mask & False].cpu())
                means.append(measured if counts else measured.nothing())
        metrics = reduce(add, means).over(ranks.total).floats()
        if training.method == "language_modeling":
            return metrics | {"loss": metrics["text_nll"]}
        variance = metrics["mixing_weight_square"] - metrics["mixing_weight"] ** 2
        by_lookahead = [metrics[f"talk_nll_{j}"] for j in range(model.config.lookahead)]
        metrics |= {
            "loss": sum(by_lookahead) / len(by_lookahead),
            "mixing_weight_deviation": max(0.0, variance) ** 0.5,
            **gain_by_difficulty(*ranks.gather(torch.cat(targets)).unbind(-1)),
        }
        if objective.policy_weight > 0 and model.config.thinking == "sample":
            metrics |= _gradient_norms(model, batches[0], config, objective, ranks)
        return metrics

    return evaluate


def _parts(batch: Batch, config: TrainConfig, device: torch.device, ranks: Ranks) -> Iterator[tuple[Batch, bool]]:
    """Returns the micro-batches of a rank, as many on each, and whether they count.

    Texts that do not divide among the ranks are in the last one of all ranks, and count on one.
    """
    share = ranks.share(len(batch))
    size = config.training.micro_batch_size or max(1, len(share))
    for first in range(share.start, share.stop, size):
        yield batch.part(first, min(size, share.stop - first)).to(device), True
    rest = len(batch) % ranks.size
    for first in range(len(batch) - rest, len(batch), size):
        yield batch.part(first, min(size, len(batch) - first)).to(device), ranks.leads


def _learn(
    model: QuietStarForCausalLM,
    batch: Batch,
    config: TrainConfig,
    objective: Objective,
    seed: int,
    reuse_sampling_pass: bool,
    counts: StepDenominators | None = None,
) -> LearnOutput:
    return learn(
        model,
        batch.tokens,
        batch.attention_mask,
        anchors=config.model.positions,
        objective=objective,
        seed=seed,
        first_text=batch.first,
        texts_in_step=batch.step_size,
        counts=None if counts is None else counts.of(model, batch),
        reuse_sampling_pass=reuse_sampling_pass,
        replay=replay_stage(config.training),
    )


def _weight(batch: Batch) -> float | None:
    """Returns the number of targets, or None where all texts have equally many.

    With padding, several documents in a text, or a loss on completions alone, the numbers differ.
    """
    same = batch.attention_mask is None and batch.loss_mask is None
    return None if same else float(text_targets(batch).sum())


def text_states(model: QuietStarForCausalLM, batch: Batch) -> Tensor:
    """Returns the hidden states [B, L, E] of the base model, differentiable; no document of a text sees another."""
    if batch.attention_mask is None:
        states: Tensor = model.decoder(input_ids=batch.tokens, use_cache=False).last_hidden_state
        return states
    padding = read_padding(batch.tokens, batch.attention_mask)
    no_streams = torch.zeros(len(batch), 0, dtype=torch.int32, device=batch.tokens.device)
    text_pass = ThoughtPass(batch.tokens.shape[1], 0, no_streams, padding.start, model.config.backend)
    return model.run_decoder(model.base.get_input_embeddings()(batch.tokens), padding.position_ids, text_pass)


def token_nll(model: QuietStarForCausalLM, batch: Batch) -> Tensor:
    """Returns the NLL in nats of each next token, without thoughts.

    Args:
        model: Thinking model whose `base` predicts.
        batch: Texts to predict; their targets are those of `text_targets`.

    Returns:
        NLLs, float32 [B, L-1], differentiable; 0 where there is no target.
    """
    head = model.head
    target = batch.tokens[:, 1:].masked_fill(~text_targets(batch), IGNORE)
    return linear_cross_entropy(
        text_states(model, batch)[:, :-1].flatten(0, 1),
        head.weight,
        target.flatten(),
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        backend=model.config.backend,
    ).view(target.shape)


def _text_loss(model: QuietStarForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the mean NLL of the next tokens, differentiable, and the NLLs [B * (L-1)], 0 where there is no target."""
    head, states = model.head, text_states(model, batch)
    counted = text_targets(batch).flatten()
    target = batch.tokens[:, 1:].flatten()
    return linear_cross_entropy(
        states[:, :-1].flatten(0, 1),
        head.weight,
        target if _weight(batch) is None else target.masked_fill(~counted, IGNORE),
        row_weight=counted.double() / counted.sum().clamp_min(1),
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        backend=model.config.backend,
    )


def _text_means(model: QuietStarForCausalLM, batch: Batch) -> Means:
    _, nll = _text_loss(model, batch)
    return Means(("text_nll",), nll.double().sum()[None], text_targets(batch).sum().double()[None])


def _gradient_norms(
    model: QuietStarForCausalLM, batch: Batch, config: TrainConfig, objective: Objective, ranks: Ranks
) -> dict[str, float]:
    """Returns the 2-norms of the gradients of the language-model part and the policy part of the loss, as in training.

    No `.grad` is written, and the gradients of one part are freed before those of the other are made.
    """
    was_training = model.training
    model.train()  # layers are checkpointed only in this mode; there is no dropout
    norm = _sharded_gradient_norm if ranks.size > 1 else _gradient_norm
    try:
        return {
            "gradient_norm_lm": norm(model, batch, config, replace(objective, policy_weight=0.0), ranks),
            "gradient_norm_policy": norm(
                model, batch, config, replace(objective, base_weight=0.0, talk_weight=0.0), ranks
            ),
        }
    finally:
        model.train(was_training)


def _losses(
    model: QuietStarForCausalLM, batch: Batch, config: TrainConfig, objective: Objective, ranks: Ranks
) -> Iterator[Tensor]:
    """Yields the share of each micro-batch in the loss of a batch, differentiable."""
    device = next(model.parameters()).device
    counts, reuse = StepDenominators(config, objective), config.training.reuse_sampling_pass
    for part, counted in _parts(batch, config, device, ranks):
        with torch.enable_grad():
            output = call(model, _learn, part, config, objective, EVALUATION_SEED, reuse, counts)
            loss = output.loss * (counted * len(part) / len(batch))
            del output
        yield loss


def _gradient_norm(
    model: QuietStarForCausalLM, batch: Batch, config: TrainConfig, objective: Objective, ranks: Ranks
) -> float:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    one = config.training.micro_batch_size is None or config.training.micro_batch_size >= len(batch)
    sums: list[Tensor | None] = [None] * len(parameters)
    for loss in _losses(model, batch, config, objective, ranks):
        found: list[Tensor | None] = list(torch.autograd.grad(loss, parameters, allow_unused=True))
        del loss
        for index, gradient in enumerate(found):
            found[index] = None  # frees it as soon as it is added
            if gradient is not None:
                before = sums[index]
                if before is not None:
                    before.add_(gradient)
                else:  # a sum in 16 bits would lose small gradients
                    sums[index] = gradient if one or gradient.dtype.itemsize >= 4 else gradient.float()
    norms = [_norm(total) for total in sums if total is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def _sharded_gradient_norm(
    model: QuietStarForCausalLM, batch: Batch, config: TrainConfig, objective: Objective, ranks: Ranks
) -> float:
    """Returns the same as `_gradient_norm`; only a whole backward pass sums gradients over the ranks."""
    for loss in _losses(model, batch, config, objective, ranks):
        loss.backward()
    squares = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    for parameter in model.parameters():
        if parameter.grad is not None:
            squares += _norm(own_part(parameter.grad)).double().square()
            parameter.grad = None
    return float(ranks.total_over_shards(squares).sqrt())


def _norm(gradient: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
    return norm
