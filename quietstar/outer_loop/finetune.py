"""Supervised fine-tuning of a base model on prompts with completions, which ends every iteration.

`fine_tune` is read first. `make_base` makes the base model of the embedded defaults with it: a character model with
random weights, trained on the human-written examples of the task. `free_memory` frees a model between phases, so that
only one is in memory.
"""

from __future__ import annotations

import gc
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from quietstar.config.loops import GeneratorOptions, OuterLoopConfig
from quietstar.config.training import FinetuningOptions, TrainingOptions
from quietstar.data.batches import IndexedBatches
from quietstar.data.examples import Example, encode_example, pack_examples
from quietstar.errors import CheckpointError, ConfigError
from quietstar.model.adapters import has_adapters, merge_adapters
from quietstar.model.loading import character_tokenizer, small_llama, weights_sha256
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.outer_loop.phases import Phases, key_of
from quietstar.runs.files import saving, write_whole
from quietstar.tasks.task import Task
from quietstar.training.finetuning import apply_finetuning
from quietstar.training.step_functions import language_modeling_step
from quietstar.training.trainer import Trainer

MODEL, RUN = "model", "train"
"""Directories of a fine-tuned model and of the run that made it."""

BASE, FRESH = "base", "fresh"
"""Directories of the base model of an embedded default and of its random initial weights."""

END = "$"
"""Name of the end-of-sequence token; not a symbol of any task."""


def load_for_training(
    path: str | Path, options: GeneratorOptions, tokenizer: PreTrainedTokenizerBase
) -> QuietStarForCausalLM:
    """Returns a base model in the form that the engine trains; only its `base` is used.

    Raises:
        ConfigError, CheckpointError, UnsupportedBackboneError: The model can't be used; the message says why.
    """
    torch.manual_seed(0)  # parameters that thinking adds are random
    return QuietStarForCausalLM.from_base(
        path, tokenizer, dtype=getattr(torch, options.dtype), backend=options.backend, start_text=[0], end_text=[0]
    )


def fine_tune(
    base: str | Path,
    base_sha256: str,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    row_length: int,
    steps: Callable[[int], int],
    model_options: GeneratorOptions,
    finetuning: FinetuningOptions,
    training: TrainingOptions,
    out: Path,
    label: str,
) -> dict[str, Any]:
    """Trains a model on examples; the loss covers exactly their completions, including the end-of-sequence token.

    Args:
        base: Directory or hub name of the weights to start from.
        base_sha256: Expected `weights_sha256` of these weights.
        tokenizer: Tokenizer of the base model.
        examples: Encoded examples in any order; they are shuffled with `training.seed`.
        row_length: Number of tokens of a row, into which whole examples are packed.
        steps: Function from the number of rows to the number of optimizer steps of `training.batch_size` rows.
        model_options: Options of the dtype of the weights and the backend of the kernels.
        finetuning: Options that say which weights are trained; adapters are merged at the end.
        training: Options of the optimizer and the training loop.
        out: Directory in which `model/`, a plain model directory, and `train/`, the run, are written.
        label: Text before the progress.

    Returns:
        `steps`, `rows`, `base_sha256` of the initial weights and `model_sha256` of the final ones.

    Raises:
        CheckpointError: The base has other weights.
    """
    model = load_for_training(base, model_options, tokenizer)
    found = weights_sha256(model.base)
    if found != base_sha256:
        raise CheckpointError(
            f"{base}: its weights have changed since the run began (sha256 {found[:12]}, not {base_sha256[:12]}); "
            "every iteration starts from the same base"
        )
    shuffled = list(examples)
    random.Random(training.seed).shuffle(shuffled)
    rows = pack_examples(shuffled, row_length)
    count = steps(len(rows))
    batches = IndexedBatches(
        rows.tokens, training.batch_size, training.seed, rows.attention_mask, loss_mask=rows.loss_mask
    )
    apply_finetuning(model, finetuning, "language_modeling")
    Trainer(
        model,
        language_modeling_step,
        batches,
        replace(training, steps=count, eval_every=0),
        out / RUN,
        run_options={"base_sha256": base_sha256, "row_length": row_length},
        progress_label=label,
    ).run()
    save_plain(model, tokenizer, out / MODEL)
    return {
        "steps": count,
        "rows": len(rows),
        "base_sha256": found,
        "model_sha256": weights_sha256(model.base),
    }


def save_plain(model: QuietStarForCausalLM, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Saves the base alone as a model directory, which is never incomplete."""
    if has_adapters(model):
        merge_adapters(model)
    new = directory.with_name(f"{directory.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    with saving(new):
        tokenizer.save_pretrained(new)
        model.base.save_pretrained(new)
    shutil.rmtree(directory, ignore_errors=True)
    new.rename(directory)


def forget_checkpoints(out: Path) -> None:
    """Deletes the checkpoints of a run that has saved its model: with optimizer states they are several times its
    size.
    """
    shutil.rmtree(out / RUN / "checkpoints", ignore_errors=True)


def forget_other_run(directory: Path, key: str) -> None:
    """Deletes a training run that was begun with other inputs; an unfinished run has no manifest that would tell."""
    mark = directory / "phase"
    if directory.exists() and (not mark.is_file() or mark.read_text() != key):
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(mark, key)


def make_base(config: OuterLoopConfig, task: Task, phases: Phases) -> str:
    """Makes the base model of an embedded default unless it exists, and returns its directory.

    Args:
        config: Configuration of the run; `characters` and `training` are used.
        task: Task with `symbols` and `pretraining`.
        phases: Phases of the run.

    Raises:
        ConfigError: The task has no symbols, so that no character model can be made for it.
    """
    if not task.symbols:
        raise ConfigError(f"task: {config.task} has no character model of its own; name a model with model.path")
    out, options, seed = Path(config.output_dir) / BASE, config.characters, config.training.seed
    examples = task.pretraining()
    inputs = {
        "training.seed": seed,
        "symbols": task.symbols,
        "examples": key_of({"examples": [asdict(one) for one in examples]}),
        **{f"characters.{name}": value for name, value in asdict(options).items()},
    }

    def make(key: str) -> dict[str, Any]:
        forget_other_run(out, key)
        tokenizer = character_tokenizer(task.symbols, END)
        model = small_llama(
            seed,
            len(tokenizer),
            layers=options.layers,
            hidden_size=options.hidden_size,
            intermediate_size=round(options.hidden_size * 8 / 3 / 8) * 8,
            context=options.context,
            end=tokenizer.eos_token_id,
        )
        shutil.rmtree(out / FRESH, ignore_errors=True)
        with saving(out / FRESH):
            tokenizer.save_pretrained(out / FRESH)
            model.save_pretrained(out / FRESH)
        training = replace(
            config.training,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            micro_batch_size=None,
        )
        return fine_tune(
            out / FRESH,
            weights_sha256(model),
            tokenizer,
            [encode_example(tokenizer, one.prompt, one.completion, one.name) for one in examples],
            options.row_length,
            lambda rows: options.steps,
            config.model,
            config.finetuning,
            training,
            out,
            "the base model",
        )

    phases.run(0, "make_base", inputs, make)
    forget_checkpoints(out)
    free_memory()
    return str(out / MODEL)


def free_memory() -> None:
    """Frees the memory of finished phases; a trained model is in a reference cycle with its hooks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
