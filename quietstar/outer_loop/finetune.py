"""Supervised fine-tuning of a base model on prompts with completions: what every iteration ends in."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from quietstar.config import FinetuningOptions, TrainingOptions
from quietstar.data import IndexedBatches
from quietstar.data.examples import Example, pack_examples
from quietstar.errors import CheckpointError
from quietstar.files import write_whole
from quietstar.model import QuietStarForCausalLM
from quietstar.model.adapters import has_adapters, merge_adapters
from quietstar.outer_loop.options import GeneratorOptions
from quietstar.outer_loop.weights import weights_sha256
from quietstar.training import Trainer
from quietstar.training.finetuning import apply_finetuning
from quietstar.training.methods import language_modeling_step

MODEL, RUN = "model", "train"
"""Directories of a fine-tuned model and of the run that made it."""


def load_for_training(
    path: str | Path, options: GeneratorOptions, tokenizer: PreTrainedTokenizerBase
) -> QuietStarForCausalLM:
    """A base model in the form that the engine trains; only its `base` is used.

    Raises:
        ConfigError, CheckpointError, UnsupportedBackboneError: It can't be used; the message says why.
    """
    torch.manual_seed(0)  # what thinking would add begins at random
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
    """Trains a model on examples, whose loss covers exactly their completions, end-of-sequence token included.

    Args:
        base: Directory or hub name of the weights to start from.
        base_sha256: What `weights_sha256` of them has to be.
        tokenizer: Its.
        examples: In any order; they are shuffled by `training.seed`.
        row_length: Tokens of a row of whole examples.
        steps: Optimizer steps of `training.batch_size` rows, for the number of rows that there are.
        model_options: Type of the weights and kernels.
        finetuning: Which weights are trained; adapters are merged in the end.
        training: All else.
        out: `model/`, a plain model directory, is written here, and `train/`, the run.
        label: Stands before the progress.

    Returns:
        `steps`, `rows`, `base_sha256` of the weights that it started from and `model_sha256` of those it ended with.

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
    """Saves the base alone as a model directory, which is whole or not there."""
    if has_adapters(model):
        merge_adapters(model)
    new = directory.with_name(f"{directory.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    tokenizer.save_pretrained(new)
    model.base.save_pretrained(new)
    shutil.rmtree(directory, ignore_errors=True)
    new.rename(directory)


def forget_checkpoints(out: Path) -> None:
    """Deletes the checkpoints of a run whose model is saved: they hold optimizer states, several times its size."""
    shutil.rmtree(out / RUN / "checkpoints", ignore_errors=True)


def forget_other_run(directory: Path, key: str) -> None:
    """Deletes a training run that was begun with other inputs: what it knows is in the manifest that it never wrote."""
    mark = directory / "phase"
    if directory.exists() and (not mark.is_file() or mark.read_text() != key):
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(mark, key)
