"""Verifiers by direct preference optimisation (V-STaR, arXiv 2402.06457, Eq. 2), and a control without negatives."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import logsigmoid

from quietstar.config.loops import GeneratorOptions, VerifierOptions
from quietstar.config.training import FinetuningOptions, TrainingOptions
from quietstar.data.batches import Batch
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.runs.files import saving
from quietstar.training.finetuning import apply_finetuning
from quietstar.training.step import StepResult
from quietstar.training.step_functions import ComputeStep
from quietstar.verifiers.pairs import Pair, Rows, completion_logprobs, encode_pairs, require_context, rows_of, trimmed
from quietstar.verifiers.training import Kind, VerifierRun, check_same_tokenizer

REFERENCE = "reference.safetensors"


def dpo_loss(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Returns -log sigmoid(beta ((log V+ - log G+) - (log V- - log G-))) of each pair.

    Args:
        policy: Log-probabilities of the right and of the wrong completion under the policy, [B, 2], in nats.
        reference: Log-probabilities of the same completions under the reference, [B, 2], in nats.
        beta: Coefficient of the log-ratios; the larger, the closer the policy stays to the reference.

    Returns:
        The losses, [B].
    """
    ratio = policy - reference
    return -logsigmoid(beta * (ratio[:, 0] - ratio[:, 1]))


def dpo_step(beta: float, nll_weight: float = 0.0) -> ComputeStep:
    """Returns the step function of a trainer for rows of pairs; their `values` [B, 2] are the reference's
    log-probabilities.

    The metrics are means over pairs: `accuracy` (the right completion has the larger log-ratio to the reference),
    `likelihood_accuracy` (the right completion has the larger log-probability), `margin` (beta times the difference of
    the log-ratios), `right_logprob`, `wrong_logprob` (nats, summed over tokens) and `right_nll` (nats per token).

    Args:
        beta: Coefficient of the log-ratios in `dpo_loss`.
        nll_weight: Weight of the right completion's NLL per token, which is added to the loss.
    """

    def step(model: QuietStarForCausalLM, batch: Batch, seed: int) -> StepResult:
        logprob, tokens = completion_logprobs(model, trimmed(batch))
        reference = cast(Tensor, batch.values)
        nll = -logprob[:, 0] / tokens[:, 0]
        loss = (dpo_loss(logprob, reference, beta) + nll_weight * nll).mean()
        right, wrong = logprob.detach().unbind(1)
        margin = (logprob.detach() - reference) @ logprob.new_tensor([1.0, -1.0])
        metrics = {
            "accuracy": (margin > 0).double().mean(),
            "likelihood_accuracy": (right > wrong).double().mean(),
            "margin": beta * margin.mean(),
            "right_logprob": right.mean(),
            "wrong_logprob": wrong.mean(),
            "right_nll": nll.detach().mean(),
        }
        return StepResult(loss, metrics)

    return step


def likelihood_step(model: QuietStarForCausalLM, batch: Batch, seed: int) -> StepResult:
    """Returns the mean over rows of the NLL per token of the first completion in each row.

    Args:
        model: Model to train; its `base` is used.
        batch: Rows of one prompt and completion each.
        seed: Seed of random numbers; not used, as nothing is random.
    """
    logprob, tokens = completion_logprobs(model, trimmed(batch), documents=1)
    return StepResult((-logprob / tokens).mean(), {"right_logprob": logprob.detach().mean()})


def train_dpo(
    base: GeneratorOptions,
    pairs: Sequence[Pair],
    options: VerifierOptions,
    training: TrainingOptions,
    finetuning: FinetuningOptions,
    out: Path | str,
    *,
    kind: Literal["dpo", "likelihood"] = "dpo",
    generator: str | None = None,
) -> Path:
    """Trains a verifier on pairs. Called again after an interruption it continues; after the end it returns at once.

    Args:
        base: Model that is both the reference and the initialisation; in V-STaR the SFT generator.
        pairs: Pairs to train on, at least one.
        options: Verifier options. With several epochs, each epoch takes the pairs in another order.
        training: Options of the training loop: seed, device and all else that `options` does not set.
        finetuning: Weights to train; adapters are merged at the end.
        out: Directory for this verifier alone.
        kind: Kind of verifier: `dpo`; or `likelihood`, the control without negatives: the NLL alone of the same pairs'
            right completions, in the same order.
        generator: Model that wrote the completions; its tokenizer must equal the base's. None: not checked.

    Returns:
        The verifier's directory, a model directory with a `verifier.json`.

    Raises:
        ConfigError: An option is out of range, the base cannot be loaded, or its tokenizer is not the generator's.
        DataError: A prompt has no tokens, or an example is longer than the model's context.
        CheckpointError: `out` holds a verifier of other data or options.
    """
    run = VerifierRun(kind, base, options, training, finetuning, Path(out))
    check_same_tokenizer(run.tokenizer, str(base.path), generator)
    groups = encode_pairs(run.tokenizer, pairs)
    if kind == "likelihood":
        groups = [[right] for right, _ in groups]
    require_context(run.policy, [example for group in groups for example in group])
    rows = rows_of(groups)
    if run.is_finished(rows):
        return run.model_directory
    if kind == "likelihood":
        apply_finetuning(run.policy, finetuning, "language_modeling")
        return run.train(run.policy, likelihood_step, rows, None, {"pairs": len(pairs)})
    key = f"{rows.sha256()} {run.fingerprint}"
    reference = _stored_reference(run.out / REFERENCE, key)
    if reference is None:
        reference = reference_logprobs(run.policy, rows, options.micro_batch_size or min(8, options.batch_size))
        _store_reference(run.out / REFERENCE, key, reference)
    apply_finetuning(run.policy, finetuning, "language_modeling")
    return run.train(run.policy, dpo_step(options.beta, options.nll_weight), rows, reference, {"pairs": len(pairs)})


@torch.no_grad()
def reference_logprobs(model: QuietStarForCausalLM, rows: Rows, batch_rows: int) -> Tensor:
    """Returns the log-probabilities of both completions of each row of pairs: float32 [n, 2] on the CPU, in nats.

    Args:
        model: Reference model: the policy before its fine-tuning.
        rows: Rows of one pair each.
        batch_rows: Number of rows per forward pass.
    """
    device = next(model.parameters()).device
    found = []
    for first in range(0, len(rows), batch_rows):
        part = slice(first, first + batch_rows)
        batch = Batch(rows.tokens[part], rows.attention_mask[part], (), loss_mask=rows.loss_mask[part])
        logprob, _ = completion_logprobs(model, trimmed(batch).to(device))
        found.append(logprob.float().cpu())
    return torch.cat(found)


def _stored_reference(file: Path, key: str) -> Tensor | None:
    """Returns the log-probabilities that an earlier part of the run computed: a GPU need not give the same bits
    twice.
    """
    try:
        with safe_open(file, framework="pt") as content:
            return content.get_tensor("logprob") if (content.metadata() or {}).get("key") == key else None
    except (OSError, SafetensorError):
        return None


def _store_reference(file: Path, key: str, logprob: Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    with saving(file.parent):
        save_file({"logprob": logprob}, new, metadata={"key": key})
        os.replace(new, file)


LOG_LIKELIHOODS = {"sum": "sum", "mean": "mean"}
DPO = Kind(
    train=lambda base, data, *rest: train_dpo(base, data.pairs, *rest),
    scores=("sum", "mean", "ratio"),
    label="verifier",
    labels={**LOG_LIKELIHOODS, "ratio": "log-ratio"},
)
LIKELIHOOD = Kind(
    train=lambda base, data, *rest: train_dpo(base, data.pairs, *rest, kind="likelihood"),
    scores=("sum", "mean", "ratio"),
    label="right completions alone",
    labels=LOG_LIKELIHOODS,
)
