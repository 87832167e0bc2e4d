"""The base model of the embedded defaults: characters, random weights, then what humans wrote about the task."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from quietstar.data.examples import encode_example
from quietstar.errors import ConfigError
from quietstar.model.from_scratch import character_tokenizer, small_llama
from quietstar.outer_loop.config import OuterLoopConfig
from quietstar.outer_loop.finetune import MODEL, fine_tune, forget_checkpoints, forget_other_run
from quietstar.outer_loop.memory import free_memory
from quietstar.outer_loop.phases import Phases, key_of
from quietstar.outer_loop.weights import weights_sha256
from quietstar.tasks.task import Task

BASE, FRESH = "base", "fresh"
"""Directories of the model and of its random beginning."""
END = "$"
"""Name of the end-of-sequence token; no task's symbol."""


def make_base(config: OuterLoopConfig, task: Task, phases: Phases) -> str:
    """The base model's directory, which is made unless it has been.

    Args:
        config: `characters` and `training` are used.
        task: With `symbols` and `pretraining`.
        phases: Of the run.

    Raises:
        ConfigError: The task has no symbols, and needs a model of yours.
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
