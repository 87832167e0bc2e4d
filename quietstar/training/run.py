"""Puts a training run together from its options: text, model, trainer, and the reports written beside checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from quietstar.config.command_line import to_yaml
from quietstar.config.thinking import ThinkingOptions
from quietstar.config.training import ModelOptions, TrainConfig, run_options
from quietstar.data.batches import IndexedBatches
from quietstar.data.loading import load_batches
from quietstar.data.packing import PackedTexts
from quietstar.data.tokenizer import check_vocabulary, load_tokenizer, tokenizer_fingerprint
from quietstar.errors import ConfigError
from quietstar.model.configuration import QuietStarConfig
from quietstar.model.loading import load_causal_lm, load_configuration
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.reporting.train_report import write_report
from quietstar.runs.files import make_output_dir
from quietstar.runs.machine import environment
from quietstar.training.finetuning import apply_finetuning
from quietstar.training.loggers import make_loggers
from quietstar.training.metrics import TrainingResult
from quietstar.training.step_functions import EVALUATION_SEED, Evaluate, compute_step, evaluate_on
from quietstar.training.thought_samples import sample_thoughts, write_samples
from quietstar.training.trainer import Trainer

SAMPLED_TEXTS, SAMPLED_THOUGHTS = 8, 24
"""Numbers of held-out texts, and of places in them, whose thoughts the report shows."""

KEPT_OF_A_THINKING_MODEL = ("initial_mixing_weight", "mixing_activation", "embedding_scale", "start_text", "end_text")
"""Options that only apply to a base model that does not think yet; a thinking model keeps its own values."""


def thinking_options(options: ModelOptions) -> dict[str, Any]:
    """The part of the options that `QuietStarForCausalLM.from_base` takes as they are."""
    names = [field.name for field in fields(ThinkingOptions)]
    return {name: getattr(options, name) for name in (*names, "start_text", "end_text")}


def train(config: TrainConfig, evaluate: Evaluate | None = None, label: str = "train") -> TrainingResult:
    """Train `config.model.path` on `config.data.path`.

    Writes `config.yaml`, `environment.json`, `metrics.jsonl`, `events.jsonl`, `samples/`, `checkpoints/` and
    `report.html` to `config.output_dir`; the last checkpoint is a model directory that
    `AutoModelForCausalLM.from_pretrained` loads once `quietstar` is imported.

    Args:
        config: Validated configuration that names a model and a text.
        evaluate: Function that measures the model; a lower `loss` is better. None: `evaluate_on` the held-out text.
        label: Text before the progress on stderr.

    Raises:
        ConfigError, DataError, UnsupportedBackboneError: An option, the text or the model cannot be used.
        CheckpointError: `config.output_dir` holds a run of other options, or only damaged checkpoints.
        NonFiniteError: A loss or gradient is NaN or infinite; the last checkpoint is intact.
        OutOfMemoryError: The memory is not enough for one text at a time.
        Interrupted: A signal has stopped training; the last finished step is saved.
    """
    assert config.model.path is not None  # checked with the configuration
    options = config.training
    tokenizer = load_tokenizer(config.model.path)
    batches, held_out = load_batches(
        config.data,
        tokenizer,
        batch_size=options.batch_size,
        seed=options.seed,
        held_out_texts=options.eval_batches * options.batch_size,
    )
    out = Path(config.output_dir)
    make_output_dir(out)  # before the model, which may take minutes to load
    model = apply_finetuning(load_model(config.model, tokenizer), config.finetuning, options.method)
    if evaluate is None and held_out is not None:
        evaluate = evaluate_on(held_out.tokens, config, held_out.attention_mask)
    identity = {f"tokenizer.{name}": value for name, value in tokenizer_fingerprint(tokenizer).items()}
    if held_out is not None:  # evaluations on different texts cannot be compared
        identity["held_out_text.sha256"] = IndexedBatches(held_out.tokens, 1, 0).fingerprint()["sha256"]
    trainer = Trainer(
        model,
        compute_step(config),
        batches,
        options,
        out,
        evaluate=evaluate,
        evaluate_at_start=True,
        after_evaluation=_reporter(config, tokenizer, held_out) if options.report else None,
        tokenizer=tokenizer,
        config_yaml=to_yaml(config),
        run_options={**run_options(config), **identity},
        environment=environment(),
        make_loggers=lambda start: make_loggers(options.log_to, out, asdict(config), start),
        progress_label=label,
    )
    result = trainer.run()
    if options.report:
        try:
            write_report(out)
        except Exception as error:  # a failed report must not fail the training
            warnings.warn(f"the last report failed: {type(error).__name__}: {error}", stacklevel=2)
    return result


def _reporter(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, held_out: PackedTexts | None
) -> Callable[[QuietStarForCausalLM, int], None]:
    """Return the function that writes, after each evaluation, thoughts at the same held-out places and the report."""

    def report(model: QuietStarForCausalLM, step: int) -> None:
        try:
            if held_out is not None and config.training.method == "quietstar":
                # no more texts at once than a step has: they must fit into the memory too
                count = min(SAMPLED_TEXTS, config.training.micro_batch_size or config.training.batch_size)
                mask = None if held_out.attention_mask is None else held_out.attention_mask[:count]
                samples = sample_thoughts(
                    model,
                    tokenizer,
                    held_out.tokens[:count],
                    mask,
                    config.model.positions,
                    SAMPLED_THOUGHTS,
                    EVALUATION_SEED,
                )
                write_samples(config.output_dir, step, samples)
        finally:
            write_report(config.output_dir)

    return report


def load_model(options: ModelOptions, tokenizer: PreTrainedTokenizerBase) -> QuietStarForCausalLM:
    """Load the model that the options name: a base model, around which a thinking model is put, or a thinking model.

    A saved thinking model keeps START, END and the mixing head. Of the options those apply that change no weights, such
    as `thought_length` and `lookahead`.

    Raises:
        ConfigError, UnsupportedBackboneError: The model can't be used; the message says why.
    """
    assert options.path is not None
    dtype = getattr(torch, options.dtype)
    thinking = thinking_options(options)
    if load_configuration(options.path).model_type == QuietStarConfig.model_type:
        saved = load_causal_lm(options.path, dtype)
        assert isinstance(saved, QuietStarForCausalLM)
        if saved.dtype != dtype:  # adapters are loaded in the dtype of their training
            raise ConfigError(f"model.dtype: got {options.dtype}, but the adapters in {options.path} are {saved.dtype}")
        model = saved
        for name, value in thinking.items():
            if name not in KEPT_OF_A_THINKING_MODEL:
                setattr(model.config, name, value)
    else:
        torch.manual_seed(0)  # the mixing head's first layers are random
        model = QuietStarForCausalLM.from_base(options.path, tokenizer, dtype=dtype, **thinking)
    check_vocabulary(tokenizer, model.head.weight.shape[0])
    return model
