"""The embedded default: does the engine learn which aside to think, and do its controls not?

Per seed: a character model reads the textbook; then each arm starts from that model and reads direct lines only,
without brackets and without labels, through the same `quietstar.train.train` that trains any other model.
"""

from __future__ import annotations

import json
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
from quietstar.textbook.measure import find_answers, measure_answers, measure_characters, sample_thoughts
from quietstar.textbook.report import ARMS, write_report
from quietstar.train import load_model, thinking_options, train
from quietstar.training import Trainer
from quietstar.training.methods import Evaluate, language_modeling_step

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


def run_textbook(config: TrainConfig) -> None:
    """Run every seed and arm, print the table, and write it with the figure to `config.output_dir`.

    What is finished is kept: the same command goes on where it was stopped.

    Raises:
        ConfigError: An option is out of range.
    """
    parse_operands(config.textbook.operands)
    out = Path(config.output_dir)
    first = config.training.seed
    results = {}
    for seed in range(first, first + config.textbook.seeds):
        training = replace(config.training, seed=seed)
        results[seed] = _run_seed(replace(config, training=training), out / f"seed-{seed}")
    print(write_report(config, results, out))


def _run_seed(config: TrainConfig, out: Path) -> dict[str, dict[str, Any]]:
    """Measures of every arm of one seed, by arm."""
    config = _write_texts(config, out)
    base = _pretrain(config, out)
    config = replace(config, model=replace(config.model, path=str(base)))
    tokenizer = character_tokenizer()
    held_out, _ = load_texts(
        replace(config.data, path=config.data.validation_path, validation_path=None, validation_fraction=0.0), tokenizer
    )
    held_out = PackedTexts(held_out.tokens[:HELD_OUT_TEXTS])

    arms = {"before": config, "quietstar": config}
    if config.textbook.controls:
        arms["no_reinforce"] = replace(config, objective=replace(config.objective, policy_weight=0.0))
        arms["pause"] = replace(config, model=replace(config.model, thinking="pause"))
        arms["language_modeling"] = replace(config, training=replace(config.training, method="language_modeling"))
    results: dict[str, dict[str, Any]] = {}
    for arm, arm_config in arms.items():
        file = out / arm / "measures.json"
        if not (file.is_file() and config.training.resume):
            model = load_model(arm_config.model, tokenizer)
            if arm != "before":
                curve = held_out.tokens[:CURVE_TEXTS]
                arm_config = replace(arm_config, preset="plain", output_dir=str(out / arm))
                trained = train(arm_config, evaluate=_curve_on(curve), label=arm)
                model = QuietStarForCausalLM.from_pretrained(trained.checkpoint)
            measures = _measure(model, held_out.tokens)
            if arm == "before":
                measures["fixed_weights"] = _at_fixed_weights(config.model, held_out.tokens)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(measures, indent=1))
        results[arm] = json.loads(file.read_text())
        print(f"seed {config.training.seed}, {ARMS[arm]}: " + _in_words(results[arm]), flush=True)
    return results


def _write_texts(config: TrainConfig, out: Path) -> TrainConfig:
    """The textbook and the direct lines of both sides of the split, as files."""
    counts, seed = parse_operands(config.textbook.operands), config.training.seed
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
    data = replace(
        config.data, path=str(out / "direct.txt"), validation_path=str(out / "held_out.txt"), append_eos=False
    )
    return replace(config, data=data)


def _pretrain(config: TrainConfig, out: Path) -> Path:
    """The character model that has read the textbook, as a model directory."""
    directory = out / "base"
    if config.training.resume and (directory / "config.json").is_file():
        return directory
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
        model, language_modeling_step, texts, options, out / "reading", progress_label=f"seed {seed}: read the textbook"
    ).run()
    tokenizer.save_pretrained(directory)
    model.base.save_pretrained(directory)
    return directory


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
