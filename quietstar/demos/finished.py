"""What the experiment has finished is kept with the options that it comes from, and is used with equal ones only."""

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
    """The options of one seed.

    Args:
        config: Of all seeds.
        seed: Which.
        out: Its output directory, where its texts lie too.
        base: Where its character model lies.
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
    """What decides which character model comes out of reading the textbook, by dotted key."""
    textbook = {f"textbook.{name}": value for name, value in asdict(config.textbook).items()}
    del textbook["textbook.seeds"], textbook["textbook.controls"]
    return {**textbook, "training.seed": config.training.seed}


def arm_options(config: TrainConfig) -> dict[str, Any]:
    """What decides the measures of an arm, by dotted key: not where its character model lies, but how it was made."""
    training = {f"training.{k}": v for k, v in asdict(config.training).items() if k not in MAY_CHANGE - {"steps"}}
    options = {**run_options(config), **training, **base_options(config)}
    del options["model.path"]
    return options


def write_finished(file: Path, values: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Write what was finished, and with which options."""
    write_json(file, {**values, OPTIONS: dict(options)})


def read_finished(file: Path, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `write_finished` wrote, without the options; None where nothing is finished yet.

    Raises:
        CheckpointError: It was written with other options, or doesn't say with which.
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
    """The error for a directory whose content comes from other options."""
    return CheckpointError(
        f"{directory}: was made with other options: {'; '.join(changed)}. "
        "Set it back, choose another --output_dir, or start over with --training.resume false"
    )
