"""Every option of a STaR or V-STaR run: one tree of dataclasses, as for training."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from quietstar.config.options import Count, Natural, NonNegative, Positive, Share, ShareAbove0, Text, at_least, check
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
        backend: Which kernels to use; `auto` picks the fastest that the device has.
    """

    backend: Backend = "auto"


@dataclass
class CharacterModelOptions:
    """The small model over single characters that the embedded defaults make and start from.

    Args:
        layers: Of its decoder.
        hidden_size: Of its residual stream.
        context: Longest text in characters.
        steps: Optimizer steps on the task's human-written examples.
        batch_size: Rows per step.
        row_length: Tokens of a row, into which as many examples are put as fit.
        learning_rate: Peak learning rate.
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
    """The task's problems.

    Args:
        path: Training problems: a JSONL file, or a directory of the task's files. Null: its public home.
        test_path: Held-out problems; null: the task's own beside `path`.
        few_shot_path: Text file of solved examples that stand before each prompt, as they are. Null: those that STaR
            has published for gsm8k and commonsenseqa; none for other tasks.
        few_shot_hint_path: The same examples with the hint shown, for rationalisation. Null: as above; where there are
            none, rationalisation needs both paths or neither.
        question: JSONL: field of the question.
        answer: JSONL: field of the final answer.
        rationale: JSONL: field of a human-written solution; null: there is none.
        id: JSONL: field of the problem's name; null: its line number.
        limit: Training problems drawn for each iteration; null: all.
        test_limit: Held-out problems, drawn by `seed`; null: all.
        digits: Addition: how many digits the summands have, such as `1-5`.
        per_group: Addition and other made-up tasks: training problems per number of digits, or group.
        test_per_group: The same of held-out problems.
        solved: Addition: worked-out sums of each number of digits above 2 that the base model reads before the loop; of
            shorter ones it reads many.
        hinted: Addition: the same with the hint, from which it learns to rationalise.
        copied: Addition: share of the hinted ones that copy the answer from the hint and work nothing out.
        scratchpad: Addition: `local` (each line by itself, which small models learn fast) or `paper` (STaR's).
        reverse: Addition: write results least significant digit first.
        seed: Of made-up problems, and of `limit`.
        timeout: Seconds that the check of one answer may take, where it runs in a worker process.
    """

    path: str | None = None
    test_path: str | None = None
    few_shot_path: str | None = None
    few_shot_hint_path: str | None = None
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
    seed: int = 0
    timeout: Positive = 5.0


@dataclass
class SamplingOptions:
    """How completions are sampled.

    Args:
        engine: `transformers`, or `vllm` (`pip install 'quietstar[vllm]'`); `auto` takes vllm where it is installed and
            the device is a GPU.
        samples: Completions per problem and iteration.
        temperature: 0 is greedy.
        top_p: Sample from the smallest set of tokens that has this probability.
        top_k: Sample from so many of the likeliest tokens; 0: all.
        max_new_tokens: Tokens of a completion at most; those that need more end with finish reason `length`.
        batch_size: Completions at once; where memory runs out, transformers goes on with half as many.
        few_shot: Put the task's solved examples before each prompt.
    """

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    samples: Count = 1
    temperature: NonNegative = 0.0
    top_p: ShareAbove0 = 1.0
    top_k: Natural = 0
    max_new_tokens: Count = 256
    batch_size: Count = 64
    few_shot: bool = True


@dataclass
class LoopOptions:
    """The outer loop.

    Args:
        iterations: How often to sample, filter and fine-tune; 0, with supervised_start: fine-tune on the human-written
            solutions and no more.
        rationalize: Retry each failure with the answer as a hint, and keep what comes back right without the hint.
        rationalization_fraction: Share of the failures that are retried.
        start_from: Fine-tune the `base` model anew in each iteration, as the papers do, or go on with the `previous`.
        accumulate: Train on what `all` iterations have kept, or on the `last` one's alone.
        demonstrations: Train on the task's human-written solutions too.
        supervised_start: Fine-tune the base on the human-written solutions before the first iteration, which then
            samples from that model (V-STaR's G_SFT).
        supervised_epochs: How long, in times through the solutions.
        supervised_steps: How long, in optimizer steps; null: `supervised_epochs`.
        supervised_learning_rate: Peak learning rate; null: that of the training.
        few_shot_in_training: Put the solved examples before the prompts that are trained on.
        deduplicate: Keep one of several completions of a problem that are `exact`ly the same, or the same `solution` by
            the task's own measure; `none` keeps all.
        max_per_problem: Completions kept of one problem at most; null: all.
        drop_hint_quotes: Leave out rationalised completions that speak of the hint.
        schedule: Fine-tuning steps of iteration i: `exponential`: int(start_steps * growth ** (i - 1)); `linear`:
            start_steps + added_steps * (i - 1); `epochs`: start_epochs + added_epochs * (i - 1) times through the data.
        start_steps: See schedule.
        growth: See schedule.
        added_steps: See schedule.
        start_epochs: See schedule.
        added_epochs: See schedule.
        row_length: Tokens of a row, into which as many examples are put as fit.
        keep_models: Keep the generators of `all` iterations on disk, or the `last` alone.
        redo: Do phases again whose inputs have changed, such as options of filtering or training, instead of refusing
            to go on; samples that still fit are used.
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
    """What is trained to tell right completions from wrong ones.

    Args:
        beta: How far DPO may move from its reference (Eq. 2 of V-STaR; the paper does not say, 0.1 is usual).
        nll_weight: Weight of the NLL of the right completion (nats per token) beside the DPO loss; 0 is the paper's.
        pairs_per_problem: Pairs of a right and a wrong completion of one problem, drawn from all such pairs.
        score: What candidates are ranked by: `sum` of log-likelihoods (the paper's), their `mean`, or their log-`ratio`
            to the reference.
        steps: Optimizer steps; null: `epochs`.
        epochs: Times through the pairs.
        batch_size: Pairs per optimizer step.
        micro_batch_size: Pairs at once, to save memory; divides batch_size.
        learning_rate: Peak learning rate.
        warmup_steps: Steps over which it rises.
        baselines: Train an outcome reward model and a model on the right completions alone as well, to compare with.
        orm_learning_rate: Peak learning rate of the outcome reward model; null: `learning_rate`.
        orm_loss: Outcome reward model: `bce` or `mse` of every token of a completion.
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
    """What is measured on held-out problems.

    Args:
        candidates: Completions per held-out problem for pass@k, Best-of-k and majority votes, after the last iteration;
            0: greedy accuracy alone.
        temperature: That candidates are sampled at.
        ks: Values of k, with commas; those above `candidates` are left out.
        greedy: Greedy accuracy on the held-out problems after each iteration.
        resamples: Of the bootstrap over problems.
    """

    candidates: Natural = 0
    temperature: NonNegative = 0.7
    ks: str = "1,2,4,8,16,32,64"
    greedy: bool = True
    resamples: Count = 1000


@dataclass
class OuterLoopConfig:
    """One run of STaR or V-STaR.

    Args:
        preset: Name of the set of values that this run started from; see `quietstar/config/presets.py`.
        output_dir: Directory for everything that the run writes.
        task: `addition`, `routes`, `gsm8k`, `commonsenseqa`, `math`, `jsonl`, `code`, or a function of yours that makes
            a task, as `package.module:function` or `file.py:function`.
        controls: Embedded defaults: run what the method is compared with as well.
        dry_run: Say what the run would do, check its data, and stop.
        model: The base model, which every fine-tuning starts from.
        characters: The small model that the embedded defaults make.
        finetuning: Which weights are trained.
        problems: The task's problems.
        sampling: How completions are sampled.
        loop: The outer loop.
        verifier: What is trained to tell right completions from wrong ones.
        evaluation: What is measured on held-out problems.
        training: The training loop of each fine-tuning; its steps are those of the schedule.
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
        config: What to check.
        require_inputs: Whether a model has to be named already.

    Returns:
        The same object.

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
    """Optimizer steps of an iteration (STaR, appendix H).

    Args:
        iteration: From 1.
        options: `schedule` and its numbers are used.
        rows: Rows of training data, used by `epochs` alone.
        batch_size: Rows per step.

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
    """The values of k in `evaluation.ks`, ascending.

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


def sampling_inputs(options: SamplingOptions) -> dict[str, Any]:
    """What of the sampling options decides the samples, by dotted key."""
    return {f"sampling.{name}": value for name, value in asdict(options).items()}
