"""From arguments and YAML to a tree of options, such as a `TrainConfig`, and back to YAML.

Later ones win: defaults, preset, `--config` file, `--key value` flags, in whatever order they are written.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import re
import sys
from argparse import SUPPRESS, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from quietstar.config.presets import DESCRIPTIONS, PRESETS
from quietstar.config.training import TrainConfig, validate
from quietstar.errors import ConfigError, QuietStarError

_Flat = dict[str, Any]


ConfigT = TypeVar("ConfigT")


@dataclasses.dataclass(frozen=True)
class Command(Generic[ConfigT]):
    """What the command line of a command is made of.

    Args:
        config: The dataclass of all options, with `preset` and `output_dir` among its own.
        presets: Values by dotted key, by name of the preset.
        descriptions: A line about each preset.
        default_preset: Its name where none is given, for the options that are.
        validate: `(configuration, require_inputs) -> configuration`; raises ConfigError.
    """

    config: type[ConfigT]
    presets: Mapping[str, Mapping[str, Any]]
    descriptions: Mapping[str, str]
    default_preset: Callable[[Mapping[str, Any]], str]
    validate: Callable[[ConfigT, bool], ConfigT]


def _train_preset(given: Mapping[str, Any]) -> str:
    own_input = given.get("model.path") is not None or given.get("data.path") is not None
    return "plain" if own_input else "textbook"


TRAIN: Command[TrainConfig] = Command(TrainConfig, PRESETS, DESCRIPTIONS, _train_preset, validate)


def parse_train_config(argv: Sequence[str] | None = None, program: str = "python -m quietstar.train") -> TrainConfig:
    """`parse_config` of a training run."""
    return parse_config(TRAIN, argv, program)


def parse_config(command: Command[ConfigT], argv: Sequence[str] | None, program: str) -> ConfigT:
    """Reads a command line.

    Args:
        command: Whose.
        argv: The arguments; None takes those of the process.
        program: How the user called it, for `--help`.

    Returns:
        A validated configuration.

    Raises:
        ConfigError: for an unknown key (with a suggestion), a value of a wrong type, or one that `validate` refuses.
        SystemExit: with status 0 after `--help` or `--print_config`.
    """
    cls = command.config
    flags = _split_arguments(sys.argv[1:] if argv is None else argv, cls)
    print_help, print_config = flags.pop("help", None), flags.pop("print_config", None)
    config_path = flags.pop("config", None)
    file = {} if config_path is None else _read_yaml(config_path, cls)
    given = {**file, **flags}
    preset = given.get("preset")
    if preset is None:
        preset = command.default_preset(given)
    if not isinstance(preset, str) or preset not in command.presets:
        suggestion = _did_you_mean(str(preset), list(command.presets))
        raise ConfigError(f"preset: got {preset!r}, needs one of {', '.join(command.presets)}{suggestion}")

    parser = _parser(command, program)
    parser.set_defaults(dict(command.presets[preset]))
    from_file = {key: _typed(parser, cls, key, value, f"{config_path}: ") for key, value in file.items()}
    parser.set_defaults({**from_file, "preset": preset})  # so that --help shows what holds without further flags
    if print_help is not None:
        parser.print_help()
        raise SystemExit(0)
    from_flags = {key: _typed(parser, cls, key, value) for key, value in flags.items()}
    values = {**_defaults(cls), **command.presets[preset], **from_file, **from_flags, "preset": preset}
    config = command.validate(_build(cls, values), print_config is None)
    if print_config is not None:
        sys.stdout.write(to_yaml(config))
        raise SystemExit(0)
    return config


def load_config(path: str | os.PathLike[str]) -> TrainConfig:
    """Reads a YAML file of any subset of the options; the rest comes from the file's preset, or else the defaults.

    Raises:
        ConfigError: naming the file for anything that is not a valid configuration.
    """
    return parse_train_config(["--config", os.fspath(path)])


def save_config(config: TrainConfig, path: str | os.PathLike[str]) -> None:
    """Writes every option to a YAML file, from which `load_config` restores an equal configuration."""
    Path(path).write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: Any) -> str:
    """The whole configuration as YAML, in the order of the dataclasses."""
    # not allow_unicode: PyYAML then writes some line separators in a way that it does not read back
    text: str = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, width=120)
    return text


def take_options(arguments: Sequence[str], names: Container[str]) -> tuple[dict[str, str], list[str]]:
    """Divides a command line.

    Args:
        arguments: All of it.
        names: Options of the command's own, each with a value.

    Returns:
        Those by name, and the arguments of the run that it is about.

    Raises:
        ConfigError: One of its own has no value.
    """
    own: dict[str, str] = {}
    rest: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in names:
            rest.append(argument)
            continue
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                raise ConfigError(f"{name}: got no value, needs one: --{name} VALUE")
            value = remaining.pop(0)
        own[name] = value
    return own, rest


def run_command(command: Callable[[], None]) -> int:
    """Runs a command and turns a problem with the user's input into one line on stderr.

    Returns:
        The exit status: 0, or 2 after a `QuietStarError`. Any other exception is a bug and keeps its traceback.
    """
    try:
        command()
    except QuietStarError as error:
        with suppress(OSError):  # where nobody takes it, on a full disk or by a closed pipe, the status says enough
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


_SWITCHES = {
    "help": "Print this help, with the defaults of the given preset and file, and stop.",
    "print_config": "Print the resulting options as YAML, and stop.",
}
_CONFIG_HELP = "YAML file with any of the options below, such as --print_config writes."


class _Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the line breaks of the list of presets."""


def _options(cls: type, prefix: str = "") -> Iterator[tuple[type, str, Any, Any]]:
    """Yields (dataclass, dotted key, type, default) of every option."""
    hints = get_type_hints(cls)
    default = cls()
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _options(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield cls, prefix + field.name, hints[field.name], getattr(default, field.name)


def _defaults(cls: type) -> _Flat:
    return {key: default for _, key, _, default in _options(cls)}


def _option_help(cls: type) -> dict[str, str]:
    """The `Args` section of a dataclass's docstring, by field."""
    section = inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")[2].split("\n\n")[0]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text) for name, text in entries}


def _parser(command: Command[ConfigT], program: str) -> ArgumentParser:
    """A parser that knows every option; `_split_arguments` has taken the line apart before it is used."""
    width = max(12, 2 + max(map(len, command.descriptions)))
    presets = "\n".join(f"  {name:{width}}{text}" for name, text in command.descriptions.items())
    parser = ArgumentParser(
        prog=program,
        usage=f"{program} [--preset NAME] [--config FILE] [--KEY VALUE ...] [--print_config] [--help]",
        description=f"presets:\n{presets}\n\nprecedence: defaults < preset < --config < --KEY VALUE",
        add_help=False,
        exit_on_error=False,
        formatter_class=_Formatter,
    )
    general = parser.add_argument_group("general")
    for name, text in _SWITCHES.items():
        general.add_argument(f"--{name}", action="store_true", default=SUPPRESS, help=text)
    general.add_argument("--config", metavar="FILE", default=SUPPRESS, help=_CONFIG_HELP)
    groups: dict[type, Any] = {command.config: general}
    for cls, key, hint, default in _options(command.config):
        group, _, name = key.rpartition(".")
        if cls not in groups:
            summary, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\n")
            more = rest.partition("Args:")[0].strip()
            groups[cls] = parser.add_argument_group(group, f"{summary} {more}".strip())
        groups[cls].add_argument(f"--{key}", type=hint, default=default, help=_option_help(cls)[name])
    return parser


def _split_arguments(argv: Sequence[str], cls: type) -> dict[str, str]:
    """Splits arguments into `--key value` or `--key=value` pairs; the key of a yes-or-no option alone means yes."""
    hints = _hints(cls)
    known = [*_defaults(cls), "config", *_SWITCHES]
    pairs: dict[str, str] = {}
    rest = list(argv)
    while rest:
        argument = "--help" if rest[0] == "-h" else rest[0]
        del rest[0]
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            hint = f"; an option is written --{name} VALUE" if name in known else "; --help lists every option"
            raise ConfigError(f"unexpected argument {argument!r}{hint}")
        if name not in known:
            raise ConfigError(f"unknown option --{name}{_did_you_mean(name, known, '--')}")
        if name in _SWITCHES:
            if equals:
                raise ConfigError(f"{name}: takes no value, got {value!r}")
        elif not equals:
            # only the name of an option is no value: the default of model.start_text begins with two dashes
            no_value = not rest or (rest[0].startswith("--") and rest[0][2:].partition("=")[0] in known)
            if no_value and hints.get(name) is bool:
                rest.insert(0, "true")
            elif no_value:
                raise ConfigError(f"{name}: got no value, needs one: --{name} VALUE")
            value = rest.pop(0)
        if name == "config" and name in pairs:
            raise ConfigError(f"config: given twice ({pairs[name]} and {value}), needs one file")
        pairs[name] = value
    return pairs


def _did_you_mean(name: str, known: Sequence[str], prefix: str = "") -> str:
    """The closest known names, compared whole and by their last part, so that a wrong or missing group is found too."""

    def similarity(candidate: str) -> float:
        def ratio(a: str, b: str) -> float:
            return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()

        text = name.replace("-", "_")
        return max(ratio(text, candidate), 0.97 * ratio(text.rpartition(".")[2], candidate.rpartition(".")[2]))

    best = max(map(similarity, known))
    if best < 0.7:
        return "; --help lists every option" if prefix else ""
    closest = [prefix + candidate for candidate in known if similarity(candidate) == best]
    return f"; did you mean {' or '.join(closest[:3])}?"


def _read_yaml(path: str, cls: type) -> _Flat:
    """Reads a YAML mapping into dotted keys. The safe loader builds plain values only."""
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError(f"config: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config: {path} is not UTF-8 text: byte {error.start}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"config: {path}{place} is not valid YAML: {getattr(error, 'problem', error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config: {path} holds a {type(content).__name__}, needs a mapping of options")
    flat: _Flat = {}
    known = list(_defaults(cls))
    groups = {key.rpartition(".")[0] for key in known}
    for key, value in _flatten(content, known):
        if key in groups:
            if not value:
                continue  # a group whose options are all commented out
            raise ConfigError(f"{path}: {key}: got {value!r}, needs a mapping of options")
        if key not in known:
            raise ConfigError(f"{path}: unknown option {key}{_did_you_mean(key, known)}")
        flat[key] = value
    return flat


def _flatten(content: Mapping[Any, Any], known: Sequence[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and key not in known:
            yield from _flatten(value, known, f"{key}.")
        else:
            yield key, value


def _typed(parser: ArgumentParser, cls: type, key: str, value: object, source: str = "") -> Any:
    """Turns a value from YAML, or the text of a flag, into the type of the option."""
    hint = _hints(cls)[key]
    from_yaml = bool(source)
    if type(value) is hint or (from_yaml and isinstance(value, str) and hint == str | None):
        return value  # nothing to convert; "null" in quotes in YAML is text, not null
    try:
        typed = parser.parse_object({key: value}, defaults=False)[key]
        if typed is not None or type(None) in get_args(hint):  # jsonargparse takes null for every type
            return typed
    except ArgumentError:
        pass
    raise ConfigError(f"{source}{key}: got {value!r}, needs {_describe(hint)}")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return {key: hint for _, key, hint, _ in _options(cls)}


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if get_args(hint):
        return " or ".join(_describe(part) for part in get_args(hint))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return names[hint]


def _build(cls: type[Any], values: _Flat, prefix: str = "") -> Any:
    hints = get_type_hints(cls)
    return cls(
        **{
            field.name: _build(hints[field.name], values, f"{prefix}{field.name}.")
            if dataclasses.is_dataclass(hints[field.name])
            else values[prefix + field.name]
            for field in dataclasses.fields(cls)
        }
    )
