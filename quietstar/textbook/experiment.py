"""The embedded default: does the engine learn which aside to think, and do its controls not?

Per seed: a character model reads the textbook; then each arm starts from that model and reads direct lines only,
without brackets and without labels, through the same `quietstar.train.train` that trains any other model.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from quietstar.config import ModelOptions, TrainConfig, TrainingOptions
from quietstar.data import PackedTexts, load_texts
from quietstar.model import QuietStarForCausalLM
from quietstar.textbook.character_model import character_model, character_tokenizer
from quietstar.textbook.corpus import direct_text, parse_operands, textbook_text
from quietstar.textbook.finished import arm_options, base_options, not_the_same, read_finished, write_finished
from quietstar.textbook.measure import find_answers, measure_answers, measure_characters, sample_thoughts
from quietstar.textbook.report import ARMS, write_report
from quietstar.train import load_model, thinking_options, train
from quietstar.training import Trainer
from quietstar.training.methods import Evaluate, language_modeling_step
from quietstar.training.output_dir import make_output_dir

HELD_OUT_TEXTS = 256
CURVE_TEXTS = 32
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
FIXED_WEIGHTS = (0.3, 0.5, 0.7, 1.0)
MEASURES = "measures.json"
BASE_OPTIONS = "textbook.json"


def run_textbook(config: TrainConfig) -> None:
    """Run every seed and arm, print the table, and write it with the figure to `config.output_dir`.

    What is finished is kept: the same command goes on where it was stopped. With `training.resume` off, what the
    experiment has written there is deleted first.

    Raises:
        ConfigError: An option is out of range, or `config.output_dir` cannot be written to.
        CheckpointError: Something there was made with other options; nothing has been changed then.
    """
    started = time.monotonic()
    out = Path(config.output_dir)
    make_output_dir(out)
    first = config.training.seed
    seeds = {seed: _of_seed(config, seed) for seed in range(first, first + config.textbook.seeds)}
    if config.training.resume:
        for seed_config in seeds.values():
            _check_finished(seed_config)
    else:
        for seed in seeds:
            _delete_finished(_directory(out, seed))
    results = {seed: _run_seed(seed_config) for seed, seed_config in seeds.items()}
    print(write_report(config, results, out))
    print(f"This command took {time.monotonic() - started:.0f} s.")


def _directory(out: Path, seed: int) -> Path:
    return out / f"seed-{seed}"


def _of_seed(config: TrainConfig, seed: int) -> TrainConfig:
    """The options of one seed; its directory is their `output_dir`."""
    out = _directory(Path(config.output_dir), seed)
    return replace(
        config,
        output_dir=str(out),
        training=replace(config.training, seed=seed),
        model=replace(config.model, path=str(out / "base")),
        data=replace(
            config.data, path=str(out / "direct.txt"), validation_path=str(out / "held_out.txt"), append_eos=False
        ),
    )


def _arms(config: TrainConfig) -> dict[str, TrainConfig]:
    """The options of each arm of one seed."""
    arms = {"before": config, "quietstar": config}
    if config.textbook.controls:
        arms["no_reinforce"] = replace(config, objective=replace(config.objective, policy_weight=0.0))
        arms["pause"] = replace(config, model=replace(config.model, thinking="pause"))
        arms["language_modeling"] = replace(config, training=replace(config.training, method="language_modeling"))
    out = Path(config.output_dir)
    return {arm: replace(options, preset="plain", output_dir=str(out / arm)) for arm, options in arms.items()}


def _check_finished(config: TrainConfig) -> None:
    """Raises CheckpointError where something of this seed was finished with other options."""
    _has_read(config)
    for arm in _arms(config).values():
        read_finished(Path(arm.output_dir) / MEASURES, arm_options(arm))


def _delete_finished(directory: Path) -> None:
    for name in (*ARMS, "reading", "base"):
        if (directory / name).is_dir():
            shutil.rmtree(directory / name)


def _run_seed(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Measures of every arm of one seed, by arm."""
    _write_texts(config)
    _pretrain(config)
    tokenizer = character_tokenizer()
    held_out, _ = load_texts(
        replace(config.data, path=config.data.validation_path, validation_path=None, validation_fraction=0.0), tokenizer
    )
    held_out = PackedTexts(held_out.tokens[:HELD_OUT_TEXTS])

    results: dict[str, dict[str, Any]] = {}
    for arm, arm_config in _arms(config).items():
        file, options = Path(arm_config.output_dir) / MEASURES, arm_options(arm_config)
        measures = read_finished(file, options)
        if measures is None:
            measures = _run_arm(arm, arm_config, held_out.tokens)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_finished(file, measures, options)
        results[arm] = measures
        print(f"seed {config.training.seed}, {ARMS[arm]}: " + _in_words(measures), flush=True)
    return results


def _run_arm(arm: str, config: TrainConfig, held_out: torch.Tensor) -> dict[str, Any]:
    """Train one arm, unless it is the one before training, and measure it."""
    seconds, started = 0.0, time.monotonic()
    if arm == "before":
        model = load_model(config.model, character_tokenizer())
    else:
        trained = train(config, evaluate=_curve_on(held_out[:CURVE_TEXTS]), label=arm)
        seconds, started = trained.seconds, time.monotonic()  # earlier parts of a stopped run count too
        model = QuietStarForCausalLM.from_pretrained(trained.checkpoint)
    measures = _measure(model, held_out)
    if arm == "before":
        measures["fixed_weights"] = _at_fixed_weights(config.model, held_out)
    return {**measures, "seconds": seconds + time.monotonic() - started}


def _write_texts(config: TrainConfig) -> None:
    """The textbook and the direct lines of both sides of the split, as files."""
    counts, seed, out = parse_operands(config.textbook.operands), config.training.seed, Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    pages = PRETRAINING.batch_size * config.textbook.pretraining_steps
    trained_on = config.training.batch_size * config.data.length * config.training.steps
    texts = {
        "textbook": textbook_text(pages, PRETRAINING_LENGTH, counts, config.textbook.useful_asides, seed),
        "direct": direct_text(trained_on, counts, held_out=False, seed=seed),
        # The same held-out lines for every seed, so that seeds differ by their model alone.
        "held_out": direct_text(config.data.length * (HELD_OUT_TEXTS + 1), counts, held_out=True, seed=0),
    }
    for name, text in texts.items():
        (out / f"{name}.txt").write_text(text)


def _has_read(config: TrainConfig) -> bool:
    """Whether the character model that has read this textbook is there."""
    base = Path(config.output_dir) / "base"
    if not base.exists():
        return False
    if read_finished(base / BASE_OPTIONS, base_options(config)) is None:
        raise not_the_same(base, [f"it has no {BASE_OPTIONS} that says which"])
    return True


def _pretrain(config: TrainConfig) -> None:
    """Make the character model that has read the textbook, as a model directory."""
    if _has_read(config):
        return
    out = Path(config.output_dir)
    tokenizer, seed = character_tokenizer(), config.training.seed
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
        steps=config.textbook.pretraining_steps,
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
        out / "reading",
        run_options=base_options(config),
        progress_label=f"seed {seed}: read the textbook",
    ).run()
    new = out / "base.new"
    shutil.rmtree(new, ignore_errors=True)
    tokenizer.save_pretrained(new)
    model.base.save_pretrained(new)
    write_finished(new / BASE_OPTIONS, {}, base_options(config))
    new.rename(out / "base")


def _curve_on(texts: torch.Tensor) -> Evaluate:
    """Measures the answers of a few held-out texts while an arm trains."""

    def evaluate(model: QuietStarForCausalLM) -> dict[str, float]:
        measures = measure_answers(model, texts)
        return {**asdict(measures), "loss": measures.nll_talk}

    return evaluate


def _measure(model: QuietStarForCausalLM, texts: torch.Tensor) -> dict[str, Any]:
    expressions = [tuple(digits) for row in find_answers(texts).expressions for digits in row]
    return {
        **asdict(measure_answers(model, texts)),
        "characters": measure_characters(model, texts),
        "answers": len(expressions),
        "distinct_expressions": len(set(expressions)),
        "thoughts": sample_thoughts(model, texts, 3),
    }


def _at_fixed_weights(options: ModelOptions, texts: torch.Tensor) -> dict[str, float]:
    """NLL of the answer with thought where the untrained model mixes with one weight everywhere."""
    results = {}
    for weight in FIXED_WEIGHTS:
        fixed = replace(options, initial_mixing_weight=weight, mixing_activation="identity")
        results[str(weight)] = measure_answers(load_model(fixed, character_tokenizer()), texts).nll_talk
    return results


def _in_words(measures: Mapping[str, Any]) -> str:
    return f"answer NLL {measures['nll_base']:.3f} without, {measures['nll_talk']:.3f} with thought"
