"""The embedded default: does the engine learn which aside to think, and do its controls not?

For each seed a new character model, a Llama over 13 characters, reads the textbook (`read_textbook`). Then each arm
starts from that model and reads direct lines only, without brackets and without labels, through the same
`quietstar.training.run.train` that trains any other model. Finished parts are stored with the options that made them,
and reused with equal options only.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from quietstar.config.training import ModelOptions, TrainConfig, TrainingOptions, parse_operands
from quietstar.data.loading import load_texts
from quietstar.demos.corpus import SYMBOLS, direct_text, textbook_text
from quietstar.demos.measure import find_answers, measure_answers, measure_characters, sample_thoughts
from quietstar.demos.options import (
    arm_options,
    base_options,
    not_the_same,
    of_seed,
    read_finished,
    write_finished,
)
from quietstar.demos.results import ARMS, write_report
from quietstar.model import loading
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.runs.files import make_output_dir, saving
from quietstar.training.run import load_model, thinking_options, train
from quietstar.training.step_functions import Evaluate, language_modeling_step
from quietstar.training.trainer import Trainer

HELD_OUT_TEXTS = 256
CURVE_TEXTS = 32
FIXED_WEIGHTS = (0.3, 0.5, 0.7, 1.0)
MEASURES = "measures.json"
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
"""Directories of the character model and of the run that made it."""
BASE_OPTIONS = "textbook.json"


def run_textbook(config: TrainConfig) -> None:
    """Runs every seed and arm, prints the table, and writes it with the figure to `config.output_dir`.

    Finished parts are kept: the same command continues where it was stopped. With `training.resume` off, what the
    experiment has written there is deleted first.

    Raises:
        ConfigError: An option is out of range, or `config.output_dir` cannot be written to.
        CheckpointError: Something there was made with other options; then nothing has been changed.
    """
    started = time.monotonic()
    out = Path(config.output_dir)
    make_output_dir(out)
    first = config.training.seed
    seeds: dict[int, TrainConfig] = {}
    for seed in range(first, first + config.textbook.seeds):
        directory = seed_directory(out, seed)
        seeds[seed] = of_seed(config, seed, directory, directory / BASE)
    if config.training.resume:
        for seed_config in seeds.values():
            _check_finished(seed_config)
    else:
        for seed in seeds:
            delete_finished(seed_directory(out, seed), ARMS)
    results = {seed: _run_seed(seed_config) for seed, seed_config in seeds.items()}
    print(write_report(config, results, out))
    print(f"This command took {time.monotonic() - started:.0f} s.")


def seed_directory(out: Path, seed: int) -> Path:
    """Returns the directory of one seed, below the output directory."""
    return out / f"seed-{seed}"


def _arms(config: TrainConfig) -> dict[str, TrainConfig]:
    """Returns the options of each arm of one seed."""
    arms = {"before": config, "quietstar": config}
    if config.textbook.controls:
        arms["no_reinforce"] = replace(config, objective=replace(config.objective, policy_weight=0.0))
        arms["pause"] = replace(config, model=replace(config.model, thinking="pause"))
        arms["language_modeling"] = replace(config, training=replace(config.training, method="language_modeling"))
    out = Path(config.output_dir)
    return {arm: replace(options, preset="plain", output_dir=str(out / arm)) for arm, options in arms.items()}


def _check_finished(config: TrainConfig) -> None:
    """Raises CheckpointError where something of this seed was finished with other options."""
    has_read(config)
    for arm in _arms(config).values():
        finished_measures(arm)


def finished_measures(config: TrainConfig) -> dict[str, Any] | None:
    """Returns the measures of an arm; None where it is not finished.

    Raises:
        CheckpointError: The arm was finished with other options.
    """
    return read_finished(Path(config.output_dir) / MEASURES, arm_options(config))


def delete_finished(directory: Path, arms: Iterable[str]) -> None:
    """Deletes the character model of a seed and the arms of these names."""
    for name in (*arms, READING, BASE):
        if (directory / name).is_dir():
            shutil.rmtree(directory / name)


def _run_seed(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Returns the measures of every arm of one seed, by arm."""
    write_texts(config)
    read_textbook(config)
    held_out = held_out_texts(config)

    results: dict[str, dict[str, Any]] = {}
    for arm, arm_config in _arms(config).items():
        measures = finished_measures(arm_config)
        if measures is None:
            measures = _run_arm(arm, arm_config, held_out)
        results[arm] = measures
        print(f"seed {config.training.seed}, {ARMS[arm]}: " + in_words(measures), flush=True)
    return results


def held_out_texts(config: TrainConfig) -> Tensor:
    """Returns the texts that an arm is measured on, int64 [n, L]."""
    options = replace(config.data, path=config.data.validation_path, validation_path=None, validation_fraction=0.0)
    texts, _ = load_texts(options, character_tokenizer())
    return texts.tokens[:HELD_OUT_TEXTS]


def _run_arm(arm: str, config: TrainConfig, held_out: Tensor) -> dict[str, Any]:
    if arm != "before":
        return train_arm(config, held_out, arm)
    started = time.monotonic()
    model = load_model(config.model, character_tokenizer())
    measures = {**_measure(model, held_out), "fixed_weights": _at_fixed_weights(config.model, held_out)}
    return _finish(config, measures, time.monotonic() - started)


def train_arm(config: TrainConfig, held_out: Tensor, label: str) -> dict[str, Any]:
    """Trains an arm, measures it, stores the measures and returns them.

    Args:
        config: Options of the arm; its character model and texts exist.
        held_out: int64 [n, L], texts to measure it on.
        label: Text before the progress.

    Returns:
        The measures of the arm.
    """
    trained = train(config, evaluate=_curve_on(held_out[:CURVE_TEXTS]), label=label)
    started = time.monotonic()
    measures = _measure(QuietStarForCausalLM.from_pretrained(trained.checkpoint), held_out)
    return _finish(config, measures, trained.seconds + time.monotonic() - started)  # with a stopped run's parts


def _finish(config: TrainConfig, measures: dict[str, Any], seconds: float) -> dict[str, Any]:
    measures["seconds"] = seconds
    file = Path(config.output_dir) / MEASURES
    file.parent.mkdir(parents=True, exist_ok=True)
    write_finished(file, measures, arm_options(config))
    return measures


def write_texts(config: TrainConfig) -> None:
    """Writes the direct lines of both sides of the split to the paths in the options."""
    counts, data = parse_operands(config.textbook.operands), config.data
    assert data.path is not None and data.validation_path is not None
    trained_on = config.training.batch_size * data.length * config.training.steps
    texts = {
        data.path: direct_text(trained_on, counts, held_out=False, seed=config.training.seed),
        # the same held-out lines for every seed, so that seeds differ by their model alone
        data.validation_path: direct_text(data.length * (HELD_OUT_TEXTS + 1), counts, held_out=True, seed=0),
    }
    for file, text in texts.items():
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(text)


def _curve_on(texts: Tensor) -> Evaluate:
    """Returns a function that measures the answers of a few held-out texts while an arm trains."""

    def evaluate(model: QuietStarForCausalLM) -> dict[str, float]:
        measures = measure_answers(model, texts)
        return {**asdict(measures), "loss": measures.nll_talk}

    return evaluate


def _measure(model: QuietStarForCausalLM, texts: Tensor) -> dict[str, Any]:
    expressions = [tuple(digits) for row in find_answers(texts).expressions for digits in row]
    return {
        **asdict(measure_answers(model, texts)),
        "characters": measure_characters(model, texts),
        "answers": len(expressions),
        "distinct_expressions": len(set(expressions)),
        "thoughts": sample_thoughts(model, texts, 3),
    }


def _at_fixed_weights(options: ModelOptions, texts: Tensor) -> dict[str, float]:
    """Returns the NLL of the answers with thought where the untrained model mixes with one weight everywhere."""
    results = {}
    for weight in FIXED_WEIGHTS:
        fixed = replace(options, initial_mixing_weight=weight, mixing_activation="identity")
        results[str(weight)] = measure_answers(load_model(fixed, character_tokenizer()), texts).nll_talk
    return results


def in_words(measures: Mapping[str, Any]) -> str:
    """Returns a one-line text of the measures of an arm."""
    return f"answer NLL {measures['nll_base']:.3f} without, {measures['nll_talk']:.3f} with thought"


def has_read(config: TrainConfig) -> bool:
    """Returns whether the character model that has read this textbook exists.

    Raises:
        CheckpointError: A model exists that has read a different textbook.
    """
    base = _base(config)
    if not base.exists():
        return False
    if read_finished(base / BASE_OPTIONS, base_options(config)) is None:
        raise not_the_same(base, [f"it has no {BASE_OPTIONS} that says which"])
    return True


def _base(config: TrainConfig) -> Path:
    assert config.model.path is not None  # set by `of_seed`
    return Path(config.model.path)


def read_textbook(config: TrainConfig) -> None:
    """Makes the character model that has read the textbook, as a model directory, unless it exists."""
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
    with saving(new):
        tokenizer.save_pretrained(new)
        model.base.save_pretrained(new)
    write_finished(new / BASE_OPTIONS, {}, base_options(config))
    new.rename(base)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token per character of the textbook."""
    return loading.character_tokenizer(SYMBOLS)


def character_model(seed: int) -> LlamaForCausalLM:
    """Returns a Llama with 2 layers of 128, about 0.4 million parameters, with random weights from `seed`."""
    return loading.small_llama(seed, len(SYMBOLS), layers=2)
