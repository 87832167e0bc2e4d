"""The options of the embedded default's experiments: variations that a sweep compares, and the files of finished parts.

A sweep changes one option at a time and leaves everything else as it is. Finished parts are stored with the options
that made them, and reused with equal options only.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any
from urllib.parse import quote

from quietstar.config.command_line import Command, narrowed, option_names, with_text
from quietstar.config.commands import TRAIN
from quietstar.config.objective import objective_of
from quietstar.config.options import Words
from quietstar.config.parsing import read_json_file
from quietstar.config.training import TrainConfig, run_options
from quietstar.errors import CheckpointError, ConfigError
from quietstar.runs.checkpoints import MAY_CHANGE
from quietstar.runs.files import changed_options, write_json

GRID = {
    "model.thought_length": "2,4,8,12",
    "model.lookahead": "1,2,3",
    "model.thoughts_per_position": "2,4",
    "objective.baseline": "leave_one_out,mean,none",
    "model.temperature": "0.7,1.0,1.4",
    "model.positions": "all,every:2,entropy:0.5",
}
"""Options that a sweep varies by default, and their values, separated by commas."""

DEFAULT = "default"


@dataclass
class SweepConfig(TrainConfig):
    """Trains the embedded default over several seeds, and again for each other value of an option, all else equal.

    Writes results.md, results.json and sweep.svg. The same command continues an interrupted sweep. Besides its own
    option the command takes those of a training run; they apply to every variation.

    Args:
        vary: Options to vary: `NAME,NAME` with the values listed below, or `NAME=VALUE,VALUE`, in one word or several.
            NAME is a dotted key or its last part. Empty: all options listed below.
    """

    vary: Words = ()


OF_A_SWEEP = {"output_dir": "runs/sweep", "textbook.seeds": 3, "training.report": False}
"""Values of a sweep that replace those of a training run."""
SWEEP = Command(
    "sweep",
    SweepConfig,
    {**TRAIN.presets, "textbook": {**TRAIN.presets["textbook"], **OF_A_SWEEP}},
    TRAIN.descriptions,
    TRAIN.default_preset,
    TRAIN.check,
    takes=TrainConfig,
    notes="varied without values:\n" + "\n".join(f"  {key:28}{values}" for key, values in GRID.items()),
)


@dataclass(frozen=True)
class Arm:
    """One variation of the embedded default.

    Args:
        name: Name of the variation and of its directory; `DEFAULT` for the configuration that every other arm differs
            from in one option.
        config: Training options of the variation.
    """

    name: str
    config: TrainConfig


@dataclass(frozen=True)
class Ablation:
    """The arms that differ in one option.

    Args:
        key: Dotted key of the option that differs.
        arms: Arms by the option's value as text, in the order to show them; the default's value is among them.
    """

    key: str
    arms: dict[str, Arm]


@dataclass(frozen=True)
class Sweep:
    """All variations of a sweep.

    Args:
        default: Arm that the others are compared with.
        ablations: Arms of each varied option.
    """

    default: Arm
    ablations: list[Ablation]

    def arms(self) -> list[Arm]:
        """Returns each arm once, the default first."""
        every = [self.default, *(arm for ablation in self.ablations for arm in ablation.arms.values())]
        return list({arm.name: arm for arm in every}.values())


def make_sweep(config: SweepConfig) -> Sweep:
    """Returns the sweep that a command line asks for.

    Raises:
        ConfigError: An option is unknown or changes nothing, or a value cannot be used.
    """
    default = Arm(DEFAULT, narrowed(TrainConfig, config))
    if config.preset != "textbook":
        raise ConfigError(
            f"preset: got {config.preset}, but a sweep varies the embedded default; "
            "leave out preset, model.path and data.path"
        )
    return Sweep(default, [_ablation(key, values, default) for key, values in _read_vary(config.vary).items()])


def option_value(config: TrainConfig, key: str) -> Any:
    """Returns the effective value of an option: for null in the objective, the value of the objective's preset."""
    value = reduce(getattr, key.split("."), config)
    group, _, name = key.rpartition(".")
    return getattr(objective_of(config.objective), name) if group == "objective" and value is None else value


def value_text(value: Any) -> str:
    """Returns a value in the form that the command line takes."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _read_vary(vary: Sequence[str]) -> dict[str, list[str]]:
    """Returns the texts of the values by dotted key."""
    wanted: dict[str, list[str]] = {}
    for word in vary or [",".join(GRID)]:
        names, equals, values = word.partition("=")
        for name in [names] if equals else names.split(","):
            key = _dotted_key(name)
            if key in wanted:
                raise ConfigError(f"vary: {key} is given twice, needs all its values in one place: {key}=VALUE,VALUE")
            if not equals and key not in GRID:
                raise ConfigError(f"vary: {key}: got no values, needs some: {key}=VALUE,VALUE")
            wanted[key] = (values if equals else GRID[key]).split(",")
            if "" in wanted[key]:
                raise ConfigError(f"vary: {key}: got {values!r}, needs values separated by single commas")
    return wanted


def _dotted_key(name: str) -> str:
    known = option_names(TrainConfig)
    found = [key for key in known if key == name] or [key for key in known if key.rpartition(".")[2] == name]
    if len(found) > 1:
        raise ConfigError(f"vary: {name} could be {' or '.join(found)}, needs one of them")
    if not found:
        parts = {key.rpartition(".")[2]: key for key in known}
        closest = difflib.get_close_matches(name.rpartition(".")[2], parts, n=1)
        hint = f"did you mean {parts[closest[0]]}?" if closest else "--help lists every option"
        raise ConfigError(f"vary: unknown option {name!r}; {hint}")
    return found[0]


def _ablation(key: str, texts: Sequence[str], default: Arm) -> Ablation:
    usual = option_value(default.config, key)
    arms = {usual: default}
    for text in texts:
        try:
            config = with_text(TRAIN, default.config, key, text)
        except ConfigError as error:
            raise ConfigError(f"vary: {key}={text}: {error}") from None
        value = option_value(config, key)
        if value in arms:
            continue
        if _decisive(config) == _decisive(default.config):
            raise ConfigError(f"vary: {key}: no measure of the embedded default depends on it")
        arms[value] = Arm(f"{key}={quote(value_text(value), safe=':,+')}", config)
    if len(arms) == 1:
        raise ConfigError(
            f"vary: {key}: got {','.join(texts)}, needs a value besides the default's {value_text(usual)}"
        )
    order = sorted(arms) if all(isinstance(value, int | float) for value in arms) else list(arms)
    return Ablation(key, {value_text(value): arms[value] for value in order})


def _decisive(config: TrainConfig) -> dict[str, Any]:
    """Returns the options that decide the measures of an arm, without those that the experiment itself sets."""
    return arm_options(of_seed(config, 0, Path(), Path()))


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
    """Returns what `write_finished` wrote, without the options; None if nothing is finished yet.

    Raises:
        CheckpointError: The values were written with other options, or without any.
    """
    if not file.is_file():
        return None
    try:
        values = dict(read_json_file(file))
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
