"""Every option of a STaR or V-STaR run, and what is wrong with them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from quietstar.config import FinetuningOptions, TrainConfig, TrainingOptions, validate
from quietstar.errors import ConfigError
from quietstar.outer_loop.options import (
    CharacterModelOptions,
    EvaluationOptions,
    GeneratorOptions,
    LoopOptions,
    ProblemOptions,
    SamplingOptions,
    VerifierOptions,
)


@dataclass
class OuterLoopConfig:
    """One run.

    Args:
        preset: Name of the set of values that this run started from; see `quietstar/outer_loop/presets.py`.
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
    output_dir: str = "runs/star"
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
    validate(TrainConfig(preset="plain", training=config.training, finetuning=config.finetuning), False)
    problems, sampling, loop = config.problems, config.sampling, config.loop
    verifier, evaluation = config.verifier, config.evaluation
    for key, value, minimum in (
        ("characters.layers", config.characters.layers, 1),
        ("characters.hidden_size", config.characters.hidden_size, 4),
        ("characters.context", config.characters.context, 8),
        ("characters.steps", config.characters.steps, 1),
        ("characters.batch_size", config.characters.batch_size, 1),
        ("characters.row_length", config.characters.row_length, 8),
        ("problems.limit", problems.limit, 1),
        ("problems.test_limit", problems.test_limit, 1),
        ("problems.per_group", problems.per_group, 1),
        ("problems.test_per_group", problems.test_per_group, 1),
        ("problems.solved", problems.solved, 0),
        ("problems.hinted", problems.hinted, 0),
        ("sampling.samples", sampling.samples, 1),
        ("sampling.top_k", sampling.top_k, 0),
        ("sampling.max_new_tokens", sampling.max_new_tokens, 1),
        ("sampling.batch_size", sampling.batch_size, 1),
        ("loop.iterations", loop.iterations, 0),
        ("loop.supervised_steps", loop.supervised_steps, 1),
        ("loop.max_per_problem", loop.max_per_problem, 1),
        ("loop.start_steps", loop.start_steps, 1),
        ("loop.added_steps", loop.added_steps, 0),
        ("loop.row_length", loop.row_length, 2),
        ("verifier.pairs_per_problem", verifier.pairs_per_problem, 1),
        ("verifier.steps", verifier.steps, 1),
        ("verifier.batch_size", verifier.batch_size, 1),
        ("verifier.micro_batch_size", verifier.micro_batch_size, 1),
        ("verifier.warmup_steps", verifier.warmup_steps, 0),
        ("evaluation.candidates", evaluation.candidates, 0),
        ("evaluation.resamples", evaluation.resamples, 1),
    ):
        if value is not None and value < minimum:
            raise ConfigError(f"{key}: got {value}, needs at least {minimum}")
    for key, number in (
        ("characters.learning_rate", config.characters.learning_rate),
        ("problems.timeout", problems.timeout),
        ("sampling.top_p", sampling.top_p),
        ("loop.growth", loop.growth),
        ("loop.start_epochs", loop.start_epochs),
        ("loop.supervised_epochs", loop.supervised_epochs),
        ("verifier.beta", verifier.beta),
        ("verifier.epochs", verifier.epochs),
        ("verifier.learning_rate", verifier.learning_rate),
        ("verifier.orm_learning_rate", verifier.orm_learning_rate),
        ("loop.supervised_learning_rate", loop.supervised_learning_rate),
    ):
        if number is not None and not (number > 0 and math.isfinite(number)):
            raise ConfigError(f"{key}: got {number}, needs a finite number above 0")
    for key, number in (
        ("sampling.temperature", sampling.temperature),
        ("evaluation.temperature", evaluation.temperature),
        ("loop.added_epochs", loop.added_epochs),
        ("verifier.nll_weight", verifier.nll_weight),
    ):
        if not (number >= 0 and math.isfinite(number)):
            raise ConfigError(f"{key}: got {number}, needs a finite number of at least 0")
    if sampling.top_p > 1:
        raise ConfigError(f"sampling.top_p: got {sampling.top_p}, needs at most 1")
    for key, share in (
        ("loop.rationalization_fraction", loop.rationalization_fraction),
        ("problems.copied", problems.copied),
    ):
        if not 0 <= share <= 1:
            raise ConfigError(f"{key}: got {share}, needs 0 to 1")
    if sampling.temperature == 0 and sampling.samples > 1:
        raise ConfigError(
            f"sampling.samples: got {sampling.samples}, but at temperature 0 all samples of a problem are the same; "
            "raise sampling.temperature, to 0.7 for instance"
        )
    if loop.iterations == 0 and not loop.supervised_start:
        raise ConfigError("loop.iterations: got 0, which leaves nothing to do unless loop.supervised_start is on")
    if verifier.micro_batch_size is not None and verifier.batch_size % verifier.micro_batch_size:
        raise ConfigError(
            f"verifier.micro_batch_size: got {verifier.micro_batch_size}, which does not divide verifier.batch_size "
            f"({verifier.batch_size})"
        )
    if not config.output_dir:
        raise ConfigError("output_dir: got an empty text")
    parse_ks(evaluation.ks)
    if require_inputs and config.model.path is None and config.preset not in EMBEDDED:
        raise ConfigError(f"model.path: missing; preset {config.preset} needs a causal language model")
    if config.model.path is not None and config.preset in EMBEDDED:
        raise ConfigError(
            f"model.path: got {config.model.path!r}, but preset {config.preset} makes its own model; use preset plain"
        )
    return config


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
