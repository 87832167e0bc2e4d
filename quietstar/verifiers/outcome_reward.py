"""Outcome reward models: a linear head that judges a completion after every token (Cobbe et al., arXiv 2110.14168).

Below the model and its training stand the scores of a solution's steps, for every kind of verifier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from transformers import PreTrainedTokenizerBase

from quietstar.config.loops import GeneratorOptions, VerifierOptions
from quietstar.config.training import FinetuningOptions, TrainingOptions
from quietstar.data.batches import Batch, permutation
from quietstar.data.examples import Example, encode_example
from quietstar.errors import CheckpointError, DataError
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.training.finetuning import apply_finetuning
from quietstar.training.step import StepResult
from quietstar.training.step_functions import text_states
from quietstar.verifiers.pairs import Labelled, distinct, of_completions, require_context, rows_of, trimmed
from quietstar.verifiers.training import Kind, LabelledData, TokenScores, VerifierRun, check_same_tokenizer

REWARD_HEAD = "reward_head.safetensors"
PER_ROW = 2
"""Completions per row, as in a row of a pair: a step of equally many rows then reads equally many completions."""
NOTHING = -1.0
"""Label in place of a completion, in a row that has fewer than `PER_ROW`."""


class OutcomeRewardModel(nn.Module):
    """A linear head on the last hidden states of a language model. Untrained, it gives 1/2 for every token.

    Args:
        policy: Language model below the head, trained together with it.
        loss: Loss of the training: with `bce` the head gives the logit of a probability; with `mse` the probability
            itself, which then may lie outside 0..1.
    """

    def __init__(self, policy: QuietStarForCausalLM, loss: Literal["bce", "mse"] = "bce") -> None:
        super().__init__()
        self.policy = policy
        self.loss = loss
        embedding = cast(Tensor, policy.base.get_input_embeddings().weight)
        dtype = torch.float64 if embedding.dtype == torch.float64 else torch.float32
        self.reward_head = nn.Linear(embedding.shape[1], 1, device=embedding.device, dtype=dtype)
        nn.init.zeros_(self.reward_head.weight)
        nn.init.constant_(self.reward_head.bias, 0.0 if loss == "bce" else 0.5)

    def forward(self, batch: Batch) -> Tensor:
        """Returns the head's output after each token, float32 [B, L]; no document of a row sees another."""
        states = text_states(self.policy, batch)
        output: Tensor = self.reward_head(states.to(self.reward_head.weight.dtype)).squeeze(-1)
        return output

    def probability(self, batch: Batch) -> Tensor:
        """Returns the probability, after each token, that its completion is right, float32 [B, L]."""
        output: Tensor = self(batch)
        return output.sigmoid() if self.loss == "bce" else output


def orm_step(model: OutcomeRewardModel, batch: Batch, seed: int) -> StepResult:
    """Returns the mean over completion tokens of the loss against the label of the token's completion.

    Args:
        model: Outcome reward model to train.
        batch: Rows whose `values` [B, 2] are 1 for a right completion, 0 for a wrong one, below 0 for none.
        seed: Seed of random numbers; not used, as nothing is random.
    """
    labels = cast(Tensor, batch.values)
    batch = trimmed(batch)
    document = cast(Tensor, batch.attention_mask)
    chosen = cast(Tensor, batch.loss_mask) & (document > 0)
    output = model(batch)[chosen]
    label = labels.gather(1, (document - 1).clamp_min(0))[chosen].to(output.dtype)
    measure = binary_cross_entropy_with_logits if model.loss == "bce" else mse_loss
    right = (output.detach() > (0.0 if model.loss == "bce" else 0.5)) == (label > 0.5)
    return StepResult(measure(output, label), {"token_accuracy": right.double().mean()}, weight=float(chosen.sum()))


def train_orm(
    base: GeneratorOptions,
    completions: Sequence[Labelled],
    options: VerifierOptions,
    training: TrainingOptions,
    finetuning: FinetuningOptions,
    out: Path | str,
    *,
    generator: str | None = None,
) -> Path:
    """Trains an outcome reward model on all completions, two per row. Called again after an interruption it continues.

    Args:
        base: Model that the training starts from.
        completions: Right and wrong completions; equal texts of a problem count once.
        options: Verifier options: `orm_loss`, and those of the training, which count rows instead of pairs.
        training, finetuning, out, generator: Training loop options, weights to train, directory and generator, as for
            `train_dpo`.

    Returns:
        The verifier's directory: a model directory with `verifier.json` and the head, `reward_head.safetensors`.

    Raises:
        ConfigError, CheckpointError: As `train_dpo`.
        DataError: All completions are right, or all wrong; or see `train_dpo`.
    """
    run = VerifierRun("orm", base, options, training, finetuning, Path(out))
    check_same_tokenizer(run.tokenizer, str(base.path), generator)
    known = distinct(completions)
    if len({one.correct for one in known}) < 2:
        raise DataError(
            f"completions: the {len(known)} different ones are all right or all wrong, and an outcome reward model "
            "needs both; sample more of each problem, or at a higher temperature"
        )
    known = [known[index] for index in permutation(len(known), training.seed)]
    examples = [encode_example(run.tokenizer, one.prompt, one.completion, f"problem {one.problem}") for one in known]
    require_context(run.policy, examples)
    places = range(0, len(known), PER_ROW)
    rows = rows_of([examples[first : first + PER_ROW] for first in places])
    labels = torch.full((len(rows), PER_ROW), NOTHING)
    labels.view(-1)[: len(known)] = torch.tensor([float(one.correct) for one in known])
    rows = replace(rows, labels=labels)
    if run.is_finished(rows):
        return run.model_directory
    apply_finetuning(run.policy, finetuning, "language_modeling")
    model = OutcomeRewardModel(run.policy, options.orm_loss)

    def save_head(directory: Path) -> None:
        save_file(dict(model.reward_head.state_dict()), directory / REWARD_HEAD)

    described = {"completions": len(known), "orm_loss": options.orm_loss, "score": "last"}
    return run.train(model, orm_step, rows, labels, described, save_head)


def load_reward_head(policy: QuietStarForCausalLM, directory: Path, loss: Literal["bce", "mse"]) -> OutcomeRewardModel:
    """Returns the outcome reward model that a directory holds, around its language model.

    Raises:
        CheckpointError: The head is missing, damaged or has another width than the hidden states.
    """
    model = OutcomeRewardModel(policy, loss)
    try:
        model.reward_head.load_state_dict(load_file(directory / REWARD_HEAD))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{directory / REWARD_HEAD}: cannot be read as the head of the model ({error})") from None
    return model.to(policy.device)


def token_probabilities(
    model: OutcomeRewardModel, examples: Sequence[Example], row_length: int | None = None, batch_rows: int = 8
) -> list[Tensor]:
    """Returns for each example the probability, after each completion token, that the completion is right.

    Args:
        model: Trained outcome reward model.
        examples, row_length, batch_rows: Examples to score, tokens per row and rows per pass, as for `score_examples`.

    Returns:
        For each example float64 [tokens of its completion], on the CPU.
    """
    return of_completions(model.policy, model.probability, examples, row_length, batch_rows)


def encode_steps(
    tokenizer: PreTrainedTokenizerBase, prompt: str, steps: Sequence[str], name: str = "solution"
) -> tuple[Example, list[int]]:
    """Encodes a solution as an example, and finds where its steps end.

    Args:
        tokenizer: Tokenizer with an end-of-sequence token.
        prompt: Prompt that the solution follows.
        steps: Texts of the steps; joined, they are the solution.
        name: Name of the solution in error messages.

    Returns:
        The example, and for each step the number of completion tokens before its end. A token that reaches into the
        next step belongs to the next step; the end-of-sequence token belongs to the last step.

    Raises:
        DataError: `steps` is empty.
    """
    if not steps:
        raise DataError(f"{name}: steps: got none, needs at least one")
    whole = encode_example(tokenizer, prompt, "".join(steps), name)
    own = whole.tokens[whole.prompt_length :]
    ends: list[int] = []
    for count in range(1, len(steps)):
        begun = encode_example(tokenizer, prompt, "".join(steps[:count]))
        tokens = begun.tokens[begun.prompt_length : -1]
        same = next((n for n, (a, b) in enumerate(zip(tokens, own, strict=False)) if a != b), len(tokens))
        ends.append(max(same, ends[-1] if ends else 0))
    return whole, [*ends, len(own)]


def step_scores(
    tokens: Tensor, ends: Sequence[int], *, probabilities: bool = False, beta: float | None = None
) -> list[float]:
    """Returns a score between 0 and 1 for each step; `Verifier.score_steps` says what it means.

    Args:
        tokens: One number for each completion token, [completion tokens]: log-probabilities in nats, or log-ratios to a
            reference, or probabilities that the completion is right.
        ends: Number of completion tokens before the end of each step, from `encode_steps`.
        probabilities: Whether `tokens` are probabilities.
        beta: Coefficient of the DPO loss, if `tokens` are log-ratios; None: they are not.
    """
    if beta is not None:
        until = torch.nn.functional.pad(tokens.cumsum(0), (1, 0))
        return [float(torch.sigmoid(beta * until[end])) for end in ends]
    scores: list[float] = []
    for start, end in zip([0, *ends], ends, strict=False):
        if start == end:
            scores.append(scores[-1] if scores else 0.5 if probabilities else 1.0)
        else:
            score = float(tokens[end - 1] if probabilities else tokens[start:end].mean().exp())
            scores.append(min(1.0, max(0.0, score)))  # a head that was trained with orm_loss mse may leave 0..1
    return scores


def _train(
    base: GeneratorOptions,
    data: LabelledData,
    options: VerifierOptions,
    training: TrainingOptions,
    finetuning: FinetuningOptions,
    out: Path,
) -> Path:
    rate = options.orm_learning_rate or options.learning_rate
    return train_orm(base, data.completions, replace(options, learning_rate=rate), training, finetuning, out)


def _load(
    policy: QuietStarForCausalLM, directory: Path, description: Mapping[str, Any]
) -> tuple[TokenScores, Sequence[Tensor]]:
    model = load_reward_head(policy, directory, description["orm_loss"])
    return partial(token_probabilities, model), tuple(model.reward_head.state_dict().values())


ORM = Kind(
    train=_train,
    scores=("last", "mean"),
    label="outcome reward model",
    labels={"last": "last token", "mean": "mean"},
    probabilities=True,
    options=("orm_loss", "orm_learning_rate"),
    load=_load,
)
