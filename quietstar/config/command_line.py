"""From a command line and YAML to the options of a command, such as a `TrainConfig`, and back to YAML.

Later sources win: defaults, preset, `--config` file, `--key value` flags, in whatever order they are written.
Read `parse_config` first; what it uses stands below it.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import sys
import textwrap
from argparse import SUPPRESS, Action, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from quietstar.config.distributed import check_alone
from quietstar.config.options import (
    COMMAS,
    SEVERAL,
    bounds,
    check,
    check_input,
    metavar,
    option_fields,
    type_hints,
    type_in_help,
)
from quietstar.config.parsing import MAX_YAML_BYTES, parse_yaml, shown
from quietstar.errors import ConfigError, DataError

_Flat = dict[str, Any]


ConfigT = TypeVar("ConfigT")


def _no_preset(given: Mapping[str, Any]) -> str:
    return ""


def _no_more_checks(config: Any, for_use: bool) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Command(Generic[ConfigT]):
    """The parts that make up the command line of one command.

    Args:
        name: Name of the command, as in `quietstar NAME`.
        config: Dataclass of the command's options; its docstring is the text of `--help`.
        presets: Values of each preset by dotted key, by name of the preset; a command with presets has the option
            `preset`.
        descriptions: One line of help about each preset, by name of the preset.
        default_preset: Function from the given options, by dotted key, to the name of the preset that holds if none is
            named.
        check: Function `(configuration, for use) -> None`; it raises ConfigError for values within their bounds that
            cannot be used, or not together. `for use` is False for a configuration that is only printed, which may lack
            inputs.
        argument: Name of the option that an argument without a `--key` sets; None refuses such arguments.
        notes: Further paragraph of the help text.
        takes_preset: Whether the user names a preset by `--preset`; otherwise the command names it itself.
        takes: Dataclass of another command, whose options this one takes besides its own; `--print_config` writes own
            ones where they are given, so that both commands read what it writes.
    """

    name: str
    config: type[ConfigT]
    presets: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    descriptions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_preset: Callable[[Mapping[str, Any]], str] = _no_preset
    check: Callable[[ConfigT, bool], object] = _no_more_checks
    argument: str | None = None
    notes: str = ""
    takes_preset: bool = True
    takes: type | None = None

    @property
    def program(self) -> str:
        """The command as a user types it."""
        return f"python -m quietstar.{self.name}"


def parse_config(command: Command[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """Reads a command line.

    Args:
        command: Command that the command line belongs to.
        argv: Arguments of the command line; None takes those of the process.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: for an unknown key (with a suggestion), a value of a wrong type or out of its bounds, or one that
            the command's own check refuses.
        SystemExit: with status 0 after `--help` or `--print_config`.
    """
    if command.name != "train":
        check_alone(command.name)
    options = _options(command.config)
    flags = _split_arguments(sys.argv[1:] if argv is None else argv, command)
    print_help, print_config = flags.pop("help", None), flags.pop("print_config", None)
    if print_config is not None and not command.takes_preset:
        raise ConfigError(f"print_config: {command.name} runs several presets; star or vstar prints the options of one")
    config_path = flags.pop("config", None)
    if config_path is not None:
        check_input(config_path, "config", once=True)
    file = {} if config_path is None else _read_yaml(config_path, list(options))
    preset, preset_values = _choose_preset(command, {**file, **flags})
    parser = _parser(command)
    parser.set_defaults(dict(preset_values))
    from_file = {key: _typed(parser, options[key], key, value, f"{config_path}: ") for key, value in file.items()}
    parser.set_defaults({**from_file, **preset})  # so that --help shows what holds without further flags
    if print_help is not None:
        parser.print_help()
        raise SystemExit(0)
    from_flags = {key: _typed(parser, options[key], key, value) for key, value in flags.items()}
    defaults = {key: option.default for key, option in options.items()}
    config: ConfigT = _build(command.config, {**defaults, **preset_values, **from_file, **from_flags, **preset})
    _check(command, config, print_config is None)
    if print_config is not None:
        left_out = {key for key, option in options.items() if option.field.default_factory is not MISSING}
        if command.takes is not None:
            left_out |= options.keys() - _options(command.takes).keys()
        print(to_yaml(config, left_out - file.keys() - flags.keys()), end="")
        raise SystemExit(0)
    return config


def with_text(command: Command[ConfigT], config: ConfigT, key: str, text: str) -> ConfigT:
    """Returns the configuration with another value of one option.

    Args:
        command: Command that the configuration belongs to.
        config: Configuration that `parse_config` returned.
        key: Dotted key of the option, such as `training.steps`.
        text: New value, written as on the command line.

    Raises:
        ConfigError: as `parse_config` does.
    """
    changed: ConfigT = _replaced(config, key, _typed(_parser(command), _options(command.config)[key], key, text))
    _check(command, changed, True)
    return changed


def _replaced(config: Any, key: str, value: Any) -> Any:
    name, _, rest = key.partition(".")
    return dataclasses.replace(config, **{name: _replaced(getattr(config, name), rest, value) if rest else value})


def option_names(cls: type) -> list[str]:
    """Returns the dotted key of every option of a tree of dataclasses."""
    return list(_options(cls))


def narrowed(cls: type[ConfigT], config: Any) -> ConfigT:
    """Returns those options of a command that belong to a class which the command's dataclass extends."""
    return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]  # ConfigT is always a dataclass


def to_yaml(config: Any, without: Container[str] = ()) -> str:
    """Returns the configuration as YAML, in the order of the dataclasses.

    Args:
        config: Configuration to write.
        without: Dotted keys of options that are left out.
    """
    # not allow_unicode: PyYAML then writes some line separators in a way that it does not read back
    text: str = yaml.safe_dump(_tree(config, without), sort_keys=False, width=120)
    return text


def _tree(config: Any, without: Container[str], prefix: str = "") -> dict[str, Any]:
    """Returns the plain values of all options but some, nested by group."""
    found: dict[str, Any] = {}
    for name in (field.name for field in option_fields(config) if prefix + field.name not in without):
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            found[name] = _tree(value, without, f"{prefix}{name}.")
        else:
            found[name] = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    return found


def _choose_preset(command: Command[Any], given: Mapping[str, Any]) -> tuple[dict[str, str], Mapping[str, Any]]:
    """Returns the option `preset` and the values of that preset; both are empty if the command has no presets."""
    if not command.presets:
        return {}, {}
    preset = given.get("preset")
    if preset is not None and not command.takes_preset:
        raise ConfigError(f"preset: got {preset!r}, needs --presets NAME,NAME: {command.name} runs several")
    if preset is None:
        preset = command.default_preset(given)
    if not isinstance(preset, str) or preset not in command.presets:
        suggestion = _did_you_mean(str(preset), list(command.presets))
        raise ConfigError(f"preset: got {shown(preset)}, needs one of {', '.join(command.presets)}{suggestion}")
    return {"preset": preset}, command.presets[preset]


def _check(command: Command[ConfigT], config: ConfigT, for_use: bool) -> None:
    """Refuses a missing option, a value out of its bounds, and what the command itself refuses."""
    for key, option in _options(command.config).items():
        if for_use and option.is_needed and getattr(config, key) is None:
            form = key.upper() if key == command.argument else f"--{key} {key.upper()}"
            raise ConfigError(f"{key}: missing, needs a value: {form}")
    check(config)
    command.check(config, for_use)


_SWITCHES = {
    "help": "Print this help, with the defaults of the given preset and file, and stop.",
    "print_config": "Print the resulting options as YAML for --config, and stop.",
}
_CONFIG_HELP = "YAML file with any of the options below, such as --print_config writes."


class _Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Help formatter that keeps the line breaks of the list of presets, and writes types and lists as a user does."""

    def _get_type_str(self, action: Action) -> str | None:
        hint = getattr(action, "_typehint", None) or action.type
        return None if hint is None else type_in_help(hint)

    def _get_help_string(self, action: Action) -> str:
        text = str(super()._get_help_string(action))
        if isinstance(action.default, list | tuple):
            text = text.replace("%(default)s", ",".join(action.default).replace("%", "%%") or "none")
        return text


class _Option(NamedTuple):
    """One option: the dataclass that declares it, the field, the type without bounds, and the type with bounds."""

    cls: type
    field: dataclasses.Field[Any]
    type: Any
    hint: Any

    @property
    def is_needed(self) -> bool:
        """Whether the option has no default and must be given."""
        return self.field.default is MISSING and self.field.default_factory is MISSING

    @property
    def default(self) -> Any:
        """Default of the option; None if there is none."""
        if self.field.default_factory is not MISSING:
            return self.field.default_factory()
        return None if self.is_needed else self.field.default


def _options(cls: Any, prefix: str = "") -> dict[str, _Option]:
    """Returns all options of a tree of dataclasses by dotted key."""
    found: dict[str, _Option] = {}
    for field in option_fields(cls):
        plain, hint = (type_hints(cls, extras)[field.name] for extras in (False, True))
        if dataclasses.is_dataclass(plain):
            found |= _options(plain, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = _Option(cls, field, plain, hint)
    return found


def _option_help(cls: type) -> dict[str, str]:
    """Returns help texts by field, from the `Args` of the docstrings of a dataclass and of those that it extends."""
    found: dict[str, str] = {}
    for own in reversed(cls.__mro__):
        section = inspect.cleandoc(own.__doc__ or "").partition("Args:\n")[2].split("\n\n")[0]
        entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE)
        found |= {name: re.sub(r"\s+", " ", text) for name, text in entries}
    return found


def _summary(cls: type) -> str:
    """Returns the part of a docstring before its sections, as one wrapped paragraph."""
    text = re.split(r"\n *(?:Args|Raises):", inspect.cleandoc(cls.__doc__ or ""))[0]
    return textwrap.fill(" ".join(text.split()), 110)


def _parser(command: Command[Any]) -> ArgumentParser:
    """Returns a parser that knows every option; `_split_arguments` has split the command line before it is used."""
    width = 2 + max(map(len, [*command.descriptions, " " * 10]))
    presets = "\n".join(f"  {name:{width}}{text}" for name, text in command.descriptions.items())
    parts = [
        _summary(command.config),
        f"presets:\n{presets}" if presets else "",
        command.notes,
        f"precedence: defaults < {'preset < ' if presets else ''}--config < --KEY VALUE",
    ]
    argument = f" {command.argument.upper()}" if command.argument else ""
    needed = [key for key, option in _options(command.config).items() if option.is_needed and key != command.argument]
    preset = " [--preset NAME]" if presets and command.takes_preset else ""
    preset += "".join(f" --{key} {key.upper()}" for key in needed)
    parser = ArgumentParser(
        prog=command.program,
        usage=f"{command.program}{argument}{preset} [--config FILE] [--KEY VALUE ...] [--print_config] [--help]",
        description="\n\n".join(filter(None, parts)),
        add_help=False,
        exit_on_error=False,
        formatter_class=_Formatter,
    )
    general = parser.add_argument_group("general")
    for name, text in _SWITCHES.items():
        general.add_argument(f"--{name}", action="store_true", default=SUPPRESS, help=text)
    general.add_argument("--config", metavar="FILE", default=SUPPRESS, help=_CONFIG_HELP)
    groups: dict[type, Any] = {command.config: general}
    for key, option in _options(command.config).items():
        group, _, name = key.rpartition(".")
        if option.cls not in groups:
            groups[option.cls] = parser.add_argument_group(group, _summary(option.cls))
        text = _option_help(option.cls)[name] + "".join(f" Needs {bound.needs}." for bound in bounds(option.hint))
        default = SUPPRESS if option.field.default is MISSING else option.field.default
        groups[option.cls].add_argument(
            f"--{key}", type=option.type, default=default, help=text, metavar=metavar(name, option.hint)
        )
    return parser


def _split_arguments(argv: Sequence[str], command: Command[Any]) -> dict[str, Any]:
    """Splits arguments into `--key value` or `--key=value` pairs and the argument without a key.

    A boolean option without a value means true; the values of a list option add up.
    """
    options = _options(command.config)
    known = [*options, "config", *_SWITCHES]
    pairs: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        argument = "--help" if rest[0] == "-h" else rest[0]
        del rest[0]
        name, equals, value = argument.removeprefix("--").partition("=")
        if re.match(r"-[^\W\d]", argument):
            raise ConfigError(f"unknown option {argument}; an option begins with two dashes; --help lists every option")
        if not argument.startswith("--"):
            if command.argument is None or command.argument in pairs:
                hint = f"; an option is written --{name} VALUE" if name in known else "; --help lists every option"
                raise ConfigError(f"unexpected argument {argument!r}{hint}")
            pairs[command.argument] = argument
            continue
        if name not in known:
            raise ConfigError(f"unknown option --{name}{_did_you_mean(name, known, '--')}")
        if name in _SWITCHES:
            if equals:
                raise ConfigError(f"{name}: takes no value, got {value!r}")
        elif not equals:
            # two dashes alone do not make a word an option: the default of model.start_text begins with them
            no_value = not rest or (rest[0].startswith("--") and rest[0][2:].partition("=")[0] in known)
            stands_alone = no_value or (
                command.argument is not None and rest[0].lower() not in ("true", "false", "yes", "no")
            )
            if name in options and options[name].type is bool and stands_alone:
                value = "true"
            elif no_value:
                raise ConfigError(f"{name}: got no value, needs one: --{name} VALUE")
            else:
                value = rest.pop(0)
        if name in ("config", command.argument) and name in pairs:
            raise ConfigError(f"{name}: given twice ({pairs[name]} and {value}), needs one")
        if name in options and get_origin(options[name].type) is tuple:
            written = getattr(options[name].hint, "__metadata__", ())
            values = _names(value) if COMMAS in written else [value]
            while SEVERAL in written and rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            pairs[name] = (*pairs.get(name, ()), *values)
        else:
            pairs[name] = value
    return pairs


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _did_you_mean(name: str, known: Sequence[str], prefix: str = "") -> str:
    """Suggests the closest known names, compared whole and by their last part, so that a wrong or missing group is
    found.
    """

    def similarity(candidate: str) -> float:
        def ratio(a: str, b: str) -> float:
            return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()

        text = name.replace("-", "_")
        if len(text) > 2 and candidate.rpartition(".")[2].startswith(text):
            return 1.0
        return max(ratio(text, candidate), 0.97 * ratio(text.rpartition(".")[2], candidate.rpartition(".")[2]))

    best = max(map(similarity, known))
    if best < 0.7:
        return "; --help lists every option" if prefix else ""
    closest = [prefix + candidate for candidate in known if similarity(candidate) == best]
    return f"; did you mean {' or '.join(closest[:3])}?"


def _read_yaml(path: str, known: Sequence[str]) -> _Flat:
    """Reads a YAML mapping into dotted keys. The safe loader builds plain values only."""
    try:
        with open(path, "rb") as file:
            content = parse_yaml(file.read(MAX_YAML_BYTES + 1), path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, DataError):
            raise ConfigError(f"config: {error}") from None
        raise ConfigError(f"config: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config: {path} holds a {type(content).__name__}, needs a mapping of options")
    flat: _Flat = {}
    groups = {key.rpartition(".")[0] for key in known}
    for key, value in _flatten(content, known):
        if key in groups:
            if not value:
                continue  # a group whose options are all commented out
            raise ConfigError(f"{path}: {key}: got {shown(value)}, needs a mapping of options")
        if key not in known:
            name = key if key.isprintable() and len(key) <= 100 else shown(key)
            raise ConfigError(f"{path}: unknown option {name}{_did_you_mean(key[:100], known)}")
        if key in flat:
            raise ConfigError(f"{path}: {key}: given twice, needs one")
        flat[key] = value
    return flat


def _flatten(content: Mapping[Any, Any], known: Sequence[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and key not in known:
            yield from _flatten(value, known, f"{key}.")
        else:
            yield key, value


def _typed(parser: ArgumentParser, option: _Option, key: str, value: object, source: str = "") -> Any:
    """Turns a value from YAML, or the text of a flag, into the type of the option."""
    hint = option.type
    from_yaml = bool(source)
    if get_origin(hint) is tuple and isinstance(value, str):
        value = _names(value) if COMMAS in getattr(option.hint, "__metadata__", ()) else [value]
    if type(value) is hint or (from_yaml and isinstance(value, str) and hint == str | None):
        return value  # nothing to convert; "null" in quotes in YAML is text, not null
    if isinstance(value, str) and hint in (Path, Path | None) and value != "null":
        if not value:  # to pathlib it is the working directory
            raise ConfigError(f"{source}{key}: got an empty text, needs a path")
        return Path(value)  # jsonargparse takes no path that is not UTF-8
    if isinstance(value, str) and not _is_scalar(value):
        if str in get_args(hint):
            return value
        raise ConfigError(f"{source}{key}: got {shown(value)}, needs {_describe(hint)}")
    try:
        typed = parser.parse_object({key: value}, defaults=False)[key]
        if typed is not None or type(None) in get_args(hint):  # jsonargparse takes null for every type
            return typed
    except ArgumentError:
        pass
    raise ConfigError(f"{source}{key}: got {shown(value)}, needs {_describe(hint)}")


def _is_scalar(text: str) -> bool:
    """Returns whether a text is YAML of one value, which is all that jsonargparse may be given: no option takes more,
    and its own reader has no limits.
    """
    try:
        return not isinstance(parse_yaml(text, ""), dict | list)
    except DataError:
        return False


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if get_origin(hint) is tuple:
        return "a list of texts"
    if get_args(hint):
        return " or ".join(_describe(part) for part in get_args(hint))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(hint, "a path")


def _build(cls: Any, values: _Flat, prefix: str = "") -> Any:
    hints = type_hints(cls)
    return cls(
        **{
            field.name: _build(hints[field.name], values, f"{prefix}{field.name}.")
            if dataclasses.is_dataclass(hints[field.name])
            else values[prefix + field.name]
            for field in option_fields(cls)
        }
    )
