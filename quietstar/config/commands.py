"""The command lines of `train`, `plan`, `star`, `vstar` and `compare`; other commands' stand with their options."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quietstar.config.command_line import Command, parse_config
from quietstar.config.loops import OuterLoopConfig, validate_loop
from quietstar.config.options import Count, Names
from quietstar.config.presets import (
    STAR_DESCRIPTIONS,
    STAR_PRESETS,
    TRAIN_DESCRIPTIONS,
    TRAIN_PRESETS,
    VSTAR_DESCRIPTIONS,
    VSTAR_PRESETS,
)
from quietstar.config.training import INPUTS, TrainConfig, validate


def _train_preset(given: Mapping[str, Any]) -> str:
    own_input = given.get("model.path") is not None or given.get("data.path") is not None
    return "plain" if own_input else "textbook"


def _check_training(config: TrainConfig, for_use: bool) -> None:
    validate(config, INPUTS if for_use else ())


TRAIN = Command("train", TrainConfig, TRAIN_PRESETS, TRAIN_DESCRIPTIONS, _train_preset, _check_training)


def parse_train_config(argv: Sequence[str] | None = None) -> TrainConfig:
    """Reads the command line of `train`, as `parse_config` does."""
    return parse_config(TRAIN, argv)


def load_config(path: str | os.PathLike[str]) -> TrainConfig:
    """Reads a YAML file of any subset of the options; the rest comes from the file's preset, or else the defaults.

    Raises:
        ConfigError: naming the file for anything that is not a valid configuration.
    """
    return parse_train_config(["--config", os.fspath(path)])


@dataclass
class PlanConfig(TrainConfig):
    """What a training run will need: memory, operations and time, before any weight is loaded.

    Besides its own options the command takes all options of `train`; the text to train on may be left out.

    Args:
        gpu: GPU to plan for, such as `H200`, or `cpu`. Null: the GPU of this machine, or its CPU if there is none.
        json: JSON file to write the plan to as well: memory in bytes, operations in FLOPs, times in seconds. Null:
            none.
    """

    gpu: str | None = None
    json: str | None = None


def _check_plan(config: PlanConfig, for_use: bool) -> None:
    validate(config, ["model.path"] if for_use else ())


PLAN = Command("plan", PlanConfig, TRAIN_PRESETS, TRAIN_DESCRIPTIONS, _train_preset, _check_plan, takes=TrainConfig)


def _star_preset(given: Mapping[str, Any]) -> str:
    return "addition" if given.get("model.path") is None else "plain"


def _vstar_preset(given: Mapping[str, Any]) -> str:
    return "routes" if given.get("model.path") is None else "plain"


STAR = Command("star", OuterLoopConfig, STAR_PRESETS, STAR_DESCRIPTIONS, _star_preset, validate_loop)
VSTAR = Command("vstar", OuterLoopConfig, VSTAR_PRESETS, VSTAR_DESCRIPTIONS, _vstar_preset, validate_loop)


@dataclass(kw_only=True)
class CompareConfig(OuterLoopConfig):
    """Runs several presets of star and vstar on one task and model, each in its own directory, and draws one figure.

    The figure shows held-out accuracy against iterations and against completions sampled. Finished work is kept: the
    same command continues it. Besides its own options the command takes those of star; they apply to every preset.

    Args:
        presets: Names of the presets to compare, separated by commas, such as `star-paper,rft`.
        budget: Total number of completions per training problem, divided among the iterations of a preset; presets that
            sample greedily keep their own number. Null: as many as each preset says.
    """

    output_dir: str = "runs/compare"
    presets: Names
    budget: Count | None = None


def _first_preset(given: Mapping[str, Any]) -> str:
    names = given.get("presets")
    names = names.split(",") if isinstance(names, str) else names
    return str(names[0]).strip() if isinstance(names, list | tuple) and names else "plain"


COMPARE = Command(
    "compare",
    CompareConfig,
    {name: {**values, "output_dir": "runs/compare"} for name, values in {**VSTAR_PRESETS, **STAR_PRESETS}.items()},
    {**VSTAR_DESCRIPTIONS, **STAR_DESCRIPTIONS},
    _first_preset,
    validate_loop,
    notes="presets of star: " + ", ".join(STAR_PRESETS) + "; of vstar: the others",
    takes_preset=False,
)


def of_preset(preset: str) -> Command[CompareConfig]:
    """Returns `COMPARE` with the given preset as its default."""
    return replace(COMPARE, default_preset=lambda given: preset)
