"""The character model that each seed starts from: what a fresh one becomes by reading the textbook."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from quietstar.config import TrainConfig, TrainingOptions
from quietstar.data import load_texts
from quietstar.model import QuietStarForCausalLM
from quietstar.textbook.character_model import character_model, character_tokenizer
from quietstar.textbook.corpus import parse_operands, textbook_text
from quietstar.textbook.finished import base_options, not_the_same, read_finished, write_finished
from quietstar.training import Trainer
from quietstar.training.methods import language_modeling_step
from quietstar.training.run import thinking_options

PRETRAINING = TrainingOptions(
    method="language_modeling",
    batch_size=16,
    learning_rate=1e-3,
    warmup_steps=50,
    final_learning_rate_fraction=0.1,
    weight_decay=0.01,
    adam_beta2=0.98,
    eval_every=0,
    save_every=0,
    log_every=50,
    keep_checkpoints=1,
)
PRETRAINING_LENGTH = 48
BASE, READING = "base", "reading"
"""Directories of the model and of the run that made it."""
BASE_OPTIONS = "textbook.json"


def has_read(config: TrainConfig) -> bool:
    """Whether the character model that has read this textbook is there.

    Raises:
        CheckpointError: One is there that has read another.
    """
    base = _base(config)
    if not base.exists():
        return False
    if read_finished(base / BASE_OPTIONS, base_options(config)) is None:
        raise not_the_same(base, [f"it has no {BASE_OPTIONS} that says which"])
    return True


def _base(config: TrainConfig) -> Path:
    assert config.model.path is not None  # `of_seed` has named it
    return Path(config.model.path)


def read_textbook(config: TrainConfig) -> None:
    """Make the character model that has read the textbook, as a model directory, unless it is there."""
    if has_read(config):
        return
    base, seed, steps = _base(config), config.training.seed, config.textbook.pretraining_steps
    out = base.parent
    out.mkdir(parents=True, exist_ok=True)
    counts, pages = parse_operands(config.textbook.operands), PRETRAINING.batch_size * steps
    text = textbook_text(pages, PRETRAINING_LENGTH, counts, config.textbook.useful_asides, seed)
    (out / "textbook.txt").write_text(text)
    tokenizer = character_tokenizer()
    model = QuietStarForCausalLM.from_base(character_model(seed), tokenizer, **thinking_options(config.model))
    textbook = replace(
        config.data,
        path=str(out / "textbook.txt"),
        validation_path=None,
        validation_fraction=0.0,
        length=PRETRAINING_LENGTH,
    )
    texts, _ = load_texts(textbook, tokenizer)
    options = replace(
        PRETRAINING,
        steps=steps,
        seed=seed,
        device=config.training.device,
        threads=config.training.threads,
        resume=config.training.resume,
    )
    Trainer(
        model,
        language_modeling_step,
        texts.tokens,
        options,
        out / READING,
        run_options=base_options(config),
        progress_label=f"seed {seed}: read the textbook",
    ).run()
    new = base.with_name(f"{base.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    tokenizer.save_pretrained(new)
    model.base.save_pretrained(new)
    write_finished(new / BASE_OPTIONS, {}, base_options(config))
    new.rename(base)
