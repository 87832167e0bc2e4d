"""Finished parts of the experiment, stored with the options that made them and reused with equal options only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from quietstar.config.training import TrainConfig, run_options
from quietstar.errors import CheckpointError
from quietstar.runs.files import changed_options, write_json
from quietstar.runs.resume_check import MAY_CHANGE

OPTIONS = "options"


def of_seed(config: TrainConfig, seed: int, out: Path, base: Path) -> TrainConfig:
    """Returns the options of one seed.

    Args:
        config: Options that all seeds share.
        seed: Seed of the training and of the texts.
        out: Output directory of the seed, which also has its texts.
        base: Directory of the seed's character model.
    """
    return replace(
        config,
        output_dir=str(out),
        training=replace(config.training, seed=seed),
        model=replace(config.model, path=str(base)),
        data=replace(
            config.data, path=str(out / "direct.txt"), validation_path=str(out / "held_out.txt"), append_eos=False
        ),
    )


def base_options(config: TrainConfig) -> dict[str, Any]:
    """Returns the options that decide the character model which reads the textbook, by dotted key."""
    textbook = {f"textbook.{name}": value for name, value in asdict(config.textbook).items()}
    del textbook["textbook.seeds"], textbook["textbook.controls"]
    return {**textbook, "training.seed": config.training.seed}


def arm_options(config: TrainConfig) -> dict[str, Any]:
    """Returns the options that decide the measures of an arm, by dotted key.

    The options that made its character model are among them; the directory of that model is not.
    """
    training = {f"training.{k}": v for k, v in asdict(config.training).items() if k not in MAY_CHANGE - {"steps"}}
    options = {**run_options(config), **training, **base_options(config)}
    del options["model.path"]
    return options


def write_finished(file: Path, values: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Writes finished values together with the options that made them."""
    write_json(file, {**values, OPTIONS: dict(options)})


def read_finished(file: Path, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns what `write_finished` wrote, without the options; None where nothing is finished yet.

    Raises:
        CheckpointError: The values were written with other options, or without any.
    """
    if not file.is_file():
        return None
    try:
        values = dict(json.loads(file.read_bytes()))
        before = dict(values.pop(OPTIONS))
    except (ValueError, TypeError, KeyError):
        raise not_the_same(file.parent, [f"{file.name} does not say which options it comes from"]) from None
    if changed := changed_options(before, options):
        raise not_the_same(file.parent, changed)
    return values


def not_the_same(directory: Path, changed: list[str]) -> CheckpointError:
    """Returns the error for a directory whose content comes from other options."""
    return CheckpointError(
        f"{directory}: was made with other options: {'; '.join(changed)}. "
        "Set it back, choose another --output_dir, or start over with --training.resume false"
    )
