"""The options of a STaR or V-STaR run as one tree of dataclasses, with the checks of values that must fit together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from quietstar.config.options import (
    INPUT,
    Count,
    Natural,
    NonNegative,
    Positive,
    Seed,
    Share,
    TemperatureOr0,
    Text,
    at_least,
    check,
    within,
)
from quietstar.config.sampling import SamplingOptions, check_engine
from quietstar.config.training import (
    BaseModelOptions,
    FinetuningOptions,
    TrainingOptions,
    check_micro_batch,
    check_training,
)
from quietstar.errors import ConfigError
from quietstar_kernels.backends import Backend


@dataclass
class GeneratorOptions(BaseModelOptions):
    """The base model, which every fine-tuning starts from.

    Args:
        backend: Implementation of the kernels; `auto` picks the fastest one that the device supports.
    """

    backend: Backend = "auto"


@dataclass
class CharacterModelOptions:
    """The small model over single characters that the embedded defaults make and start from.

    Args:
        layers: Decoder layers of the character model.
        hidden_size: Width of the character model's hidden states.
        context: Longest text that the character model can read, in characters.
        steps: Optimizer steps of the pretraining on the task's human-written examples.
        batch_size: Rows per optimizer step of the pretraining.
        row_length: Number of tokens in a training row; as many examples as fit share a row.
        learning_rate: Peak learning rate of the pretraining.
    """

    layers: Count = 3
    hidden_size: Annotated[int, at_least(4)] = 128
    context: Annotated[int, at_least(8)] = 256
    steps: Count = 700
    batch_size: Count = 4
    row_length: Annotated[int, at_least(8)] = 192
    learning_rate: Positive = 2e-3


@dataclass
class ProblemOptions:
    """The problems of the task: training problems and held-out problems.

    Args:
        path: Training problems: a JSONL file, or a directory with the task's files. Null: the data set's public home.
        test_path: Held-out problems: a JSONL file or a directory. Null: the task's own held-out file beside `path`.
        few_shot_path: Text file of solved examples, put before each prompt unchanged. Null: the examples published with
            STaR for gsm8k and commonsenseqa; none for other tasks.
        few_shot_hint_path: Text file of the same solved examples with the hint shown, for rationalisation. Null: the
            published ones, as for `few_shot_path`; if a task has none, rationalisation needs both paths or neither.
        question: Field of a JSONL line that holds the question.
        answer: Field of a JSONL line that holds the final answer.
        rationale: Field of a JSONL line that holds a human-written solution. Null: there are no solutions.
        id: Field of a JSONL line that holds the problem's name. Null: the line number is the name.
        limit: Number of training problems drawn for each iteration. Null: all.
        test_limit: Number of held-out problems, drawn at random with `seed`. Null: all.
        digits: Addition: range of the summands' lengths in digits, such as `1-5`.
        per_group: Addition and other generated tasks: training problems per group; a group of addition is one number of
            digits.
        test_per_group: Addition and other generated tasks: held-out problems per group.
        solved: Addition: worked-out sums that the base model reads before the loop, per number of digits above 2; of
            shorter sums it reads many.
        hinted: Addition: worked-out sums with the hint that the base model reads before the loop, per number of digits
            above 2; from them it learns to rationalise.
        copied: Addition: share of the sums with a hint that only copy the answer from it, without the working.
        scratchpad: Addition: form of the working: `local` (each line is complete in itself, which small models learn
            fast) or `paper` (STaR's form).
        reverse: Addition: write results with the least significant digit first.
        seed: Seed of generated problems and of the problems that `limit` and `test_limit` draw.
        timeout: Time limit for checking one answer, in seconds, for tasks that check in a worker process.
    """

    path: Annotated[str | None, INPUT] = None
    test_path: Annotated[str | None, INPUT] = None
    few_shot_path: Annotated[str | None, INPUT] = None
    few_shot_hint_path: Annotated[str | None, INPUT] = None
    question: str = "question"
    answer: str = "answer"
    rationale: str | None = None
    id: str | None = None
    limit: Count | None = None
    test_limit: Count | None = None
    digits: str = "1-5"
    per_group: Count = 500
    test_per_group: Count = 100
    solved: Natural = 3
    hinted: Natural = 100
    copied: Share = 0.0
    scratchpad: Literal["local", "paper"] = "local"
    reverse: bool = False
    seed: Seed = 0
    timeout: Positive = 5.0


@dataclass
class LoopOptions:
    """The outer loop: sample, filter, fine-tune, repeat.

    Args:
        iterations: Number of rounds of sampling, filtering and fine-tuning; 0, with supervised_start, only fine-tunes
            on the human-written solutions.
        rationalize: Whether each failed problem is tried again with the answer as a hint; a right completion is kept
            without the hint.
        rationalization_fraction: Share of the failed problems that are tried again with a hint.
        start_from: Model that each iteration fine-tunes: the `base` model, as in the papers, or the model of the
            `previous` iteration.
        accumulate: Completions to train on: those kept in `all` iterations so far, or in the `last` one only.
        demonstrations: Whether the task's human-written solutions are trained on too.
        supervised_start: Whether the base model is fine-tuned on the human-written solutions before the first
            iteration, which then samples from the resulting model (G_SFT of V-STaR).
        supervised_epochs: Length of the supervised start, in passes over the human-written solutions.
        supervised_steps: Length of the supervised start, in optimizer steps. Null: given by `supervised_epochs`.
        supervised_learning_rate: Peak learning rate of the supervised start. Null: `training.learning_rate`.
        few_shot_in_training: Whether the solved examples stand before the prompts that are trained on.
        deduplicate: Measure of equality for completions of one problem, of which equal ones are kept once: `exact`, the
            same text; `solution`, the same solution by the task's own measure; `none` keeps all.
        max_per_problem: Largest number of completions kept per problem. Null: all.
        drop_hint_quotes: Whether rationalised completions that mention the hint are left out.
        schedule: Optimizer steps of iteration i: `exponential`: int(start_steps * growth ** (i - 1)); `linear`:
            start_steps + added_steps * (i - 1); `epochs`: start_epochs + added_epochs * (i - 1) passes over the
            training data.
        start_steps: Optimizer steps of the first iteration, with schedule `exponential` or `linear`.
        growth: Factor by which the optimizer steps grow from one iteration to the next, with schedule `exponential`.
        added_steps: Optimizer steps that each iteration has more than the one before, with schedule `linear`.
        start_epochs: Passes over the training data in the first iteration, with schedule `epochs`.
        added_epochs: Passes over the training data that each iteration has more than the one before, with schedule
            `epochs`.
        row_length: Number of tokens in a training row; as many examples as fit share a row.
        keep_models: Generators to keep on disk: those of `all` iterations, or the `last` one only.
        redo: Whether phases are done again if their inputs have changed, such as options of filtering or training.
            Without it the run is refused. Samples that still fit are used again.
    """

    iterations: Natural = 5
    rationalize: bool = True
    rationalization_fraction: Share = 1.0
    start_from: Literal["base", "previous"] = "base"
    accumulate: Literal["all", "last"] = "last"
    demonstrations: bool = False
    supervised_start: bool = False
    supervised_epochs: Positive = 2.0
    supervised_steps: Count | None = None
    supervised_learning_rate: Positive | None = None
    few_shot_in_training: bool = False
    deduplicate: Literal["none", "exact", "solution"] = "exact"
    max_per_problem: Count | None = None
    drop_hint_quotes: bool = True
    schedule: Literal["exponential", "linear", "epochs"] = "exponential"
    start_steps: Count = 40
    growth: Positive = 1.2
    added_steps: Natural = 20
    start_epochs: Positive = 1.0
    added_epochs: NonNegative = 0.2
    row_length: Annotated[int, at_least(2)] = 1024
    keep_models: Literal["all", "last"] = "all"
    redo: bool = False


@dataclass
class VerifierOptions:
    """The verifier: the model that is trained to tell right completions from wrong ones.

    Args:
        beta: Coefficient beta of the DPO loss (Eq. 2 of V-STaR): the larger, the closer the verifier stays to its
            reference. The paper gives no value; 0.1 is usual.
        nll_weight: Weight of the right completion's NLL (nats per token) beside the DPO loss; 0, as in the paper,
            leaves it out.
        pairs_per_problem: Number of pairs of a right and a wrong completion drawn per problem, from all pairs of the
            problem.
        score: Score that ranks candidates: `sum` of the token log-likelihoods (the paper's), their `mean`, or their
            log-`ratio` to the reference.
        steps: Optimizer steps of the verifier's training. Null: given by `epochs`.
        epochs: Length of the verifier's training, in passes over the pairs.
        batch_size: Pairs per optimizer step.
        micro_batch_size: Pairs per forward and backward pass, to save memory; divides batch_size. Null: all at once.
        learning_rate: Peak learning rate of the DPO verifier.
        warmup_steps: Steps over which the learning rate rises linearly from 0.
        baselines: Whether an outcome reward model and a model of the right completions alone are trained too, for
            comparison.
        orm_learning_rate: Peak learning rate of the outcome reward model. Null: `learning_rate`.
        orm_loss: Loss of the outcome reward model at every token of a completion: `bce` (binary cross-entropy) or `mse`
            (mean squared error).
    """

    beta: Positive = 0.1
    nll_weight: NonNegative = 0.0
    pairs_per_problem: Count = 8
    score: Literal["sum", "mean", "ratio"] = "sum"
    steps: Count | None = None
    epochs: Positive = 1.0
    batch_size: Count = 32
    micro_batch_size: Count | None = None
    learning_rate: Positive = 5e-7
    warmup_steps: Natural = 20
    baselines: bool = False
    orm_learning_rate: Positive | None = None
    orm_loss: Literal["bce", "mse"] = "bce"


@dataclass
class EvaluationOptions:
    """Measurements on held-out problems.

    Args:
        candidates: Completions per held-out problem after the last iteration, for pass@k, Best-of-k and majority votes;
            0 measures greedy accuracy only.
        temperature: Sampling temperature of the candidates.
        ks: Values of k, separated by commas; those above `candidates` are left out.
        greedy: Whether greedy accuracy on the held-out problems is measured after each iteration.
        resamples: Number of bootstrap resamples, drawn over problems.
    """

    candidates: Natural = 0
    temperature: TemperatureOr0 = 0.7
    ks: str = "1,2,4,8,16,32,64"
    greedy: bool = True
    resamples: Annotated[int, within(1, 1_000_000)] = 1000


@dataclass
class OuterLoopConfig:
    """One run of STaR or V-STaR.

    Args:
        preset: Name of the preset that the run starts from; its values are in `quietstar/config/presets.py`.
        output_dir: Directory for all files that the run writes.
        task: Task to solve: `addition`, `routes`, `gsm8k`, `commonsenseqa`, `math`, `jsonl`, `code`, or your own
            function that makes a task, as `package.module:function` or `file.py:function`.
        controls: Embedded defaults: whether the experiments that the method is compared with are run as well.
        dry_run: Whether to print what the run would do, check its data, and stop.
        model: Base model that every fine-tuning starts from.
        characters: Small character model that the embedded defaults make.
        finetuning: Weights to train: all, or low-rank adapters.
        problems: Problems of the task: training problems and held-out problems.
        sampling: Options of sampling completions.
        loop: Options of the outer loop: iterations, filters, schedule.
        verifier: Options of the verifier and of its training.
        evaluation: Measurements on held-out problems.
        training: Options of each fine-tuning's training loop; its number of steps comes from `loop.schedule`.
    """

    preset: str = "plain"
    output_dir: Text = "runs/star"
    task: str = "addition"
    controls: bool = True
    dry_run: bool = False
    model: GeneratorOptions = field(default_factory=GeneratorOptions)
    characters: CharacterModelOptions = field(default_factory=CharacterModelOptions)
    finetuning: FinetuningOptions = field(default_factory=FinetuningOptions)
    problems: ProblemOptions = field(default_factory=ProblemOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    loop: LoopOptions = field(default_factory=LoopOptions)
    verifier: VerifierOptions = field(default_factory=VerifierOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)


def validate_loop(config: OuterLoopConfig, require_inputs: bool = True) -> OuterLoopConfig:
    """Checks every value that can be checked without reading a model or a problem.

    Args:
        config: Configuration to check.
        require_inputs: Whether a model has to be named already.

    Returns:
        The same object, so that the call can stand in an expression.

    Raises:
        ConfigError: naming the dotted key, the value, and what is needed.
    """
    check(config)
    check_training(config.training)
    check_micro_batch("verifier", config.verifier)
    sampling, loop = config.sampling, config.loop
    if sampling.temperature == 0 and sampling.samples > 1:
        raise ConfigError(
            f"sampling.samples: got {sampling.samples}, but at temperature 0 all samples of a problem are the same; "
            "raise sampling.temperature, to 0.7 for instance"
        )
    check_engine(sampling)
    if loop.iterations == 0 and not loop.supervised_start:
        raise ConfigError("loop.iterations: got 0, which leaves nothing to do unless loop.supervised_start is on")
    parse_ks(config.evaluation.ks)
    if require_inputs and config.model.path is None and config.preset not in EMBEDDED:
        raise ConfigError(f"model.path: missing; preset {config.preset} needs a causal language model")
    if config.model.path is not None and config.preset in EMBEDDED:
        raise ConfigError(
            f"model.path: got {config.model.path!r}, but preset {config.preset} makes its own model; use preset plain"
        )
    return config


def fine_tuning_steps(iteration: int, options: LoopOptions, rows: int, batch_size: int) -> int:
    """Returns the number of optimizer steps of an iteration (STaR, appendix H).

    Args:
        iteration: Number of the iteration, from 1.
        options: Loop options; `schedule` and its numbers are used.
        rows: Number of training rows; only the schedule `epochs` uses it.
        batch_size: Rows per optimizer step.

    Returns:
        At least 1. The exponential schedule gives 40, 48, 57, ..., and 7,912 at the 30th iteration.
    """
    if options.schedule == "exponential":
        steps = int(options.start_steps * options.growth ** (iteration - 1))
    elif options.schedule == "linear":
        steps = options.start_steps + options.added_steps * (iteration - 1)
    else:
        epochs = options.start_epochs + options.added_epochs * (iteration - 1)
        steps = math.ceil(rows * epochs / batch_size)
    return max(1, steps)


EMBEDDED = frozenset({"addition", "routes"})
"""Presets that make their own base model."""


def parse_ks(text: str) -> list[int]:
    """Returns the values of k in `evaluation.ks`, ascending and without repeats.

    Raises:
        ConfigError: It is not a list of whole numbers from 1.
    """
    try:
        ks = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        ks = []
    if not ks or ks[0] < 1:
        raise ConfigError(f"evaluation.ks: got {text!r}, needs whole numbers from 1 with commas, such as 1,4,16")
    return ks
