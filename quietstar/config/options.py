"""How options are declared, and what the values of the options that several commands share mean.

An option is a field of a dataclass with a type, a default, a bound and a line of the docstring. `Annotated[int,
at_least(2)]`, or one of the types below, bounds a field. `check` holds every bound of a tree of such dataclasses, and
`--help` shows it. After that come devices, paths of models and positions to think at, and `CheckpointOptions`, the
options of every command that loads a thinking model. torch is imported only when a device is asked for.
"""

from __future__ import annotations

import dataclasses
import errno
import fnmatch
import math
import operator
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from quietstar.config.parsing import shown
from quietstar.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Bound:
    """A condition on an option's value besides its type; in a list it holds for each element.

    Args:
        needs: Condition in words that follow "needs", such as "at least 2".
        allows: Function that says whether a value meets the condition.
    """

    needs: str
    allows: Callable[[Any], bool]

    def hold(self, name: str, value: Any) -> None:
        """Refuses a value that does not meet the condition.

        Raises:
            ConfigError: naming the option, the value, and what is needed.
        """
        if not self.allows(value):
            got = "an empty text" if value == "" else shown(value)
            raise ConfigError(f"{name}: got {got}, needs {self.needs}")


def at_least(least: int) -> Bound:
    """Returns the bound of whole numbers from `least` on."""
    return Bound(f"at least {least}", lambda value: value >= least)


def within(low: float, high: float) -> Bound:
    """Returns the bound of numbers from `low` to `high`, both included."""
    return Bound(f"{low} to {high}", lambda value: low <= value <= high)


_SIZED = Bound("a whole number of at most 64 bits", lambda value: -(2**63) <= value < 2**63)

Count = Annotated[int, at_least(1)]
Natural = Annotated[int, at_least(0)]
ThoughtsPerToken = Annotated[int, within(1, 1024)]
"""All thoughts of a token are in memory together."""
Whole = Annotated[int, Bound("any size", lambda value: True)]
Finite = Annotated[float, Bound("a finite number", math.isfinite)]
Positive = Annotated[float, Bound("a finite number above 0", lambda value: 0 < value < math.inf)]
NonNegative = Annotated[float, Bound("a finite number of at least 0", lambda value: 0 <= value < math.inf)]
Share = Annotated[float, within(0, 1)]
ShareBelow1 = Annotated[float, Bound("at least 0 and less than 1", lambda value: 0 <= value < 1)]
ShareAbove0 = Annotated[float, Bound("more than 0 and at most 1", lambda value: 0 < value <= 1)]
ProperShare = Annotated[float, Bound("a share between 0 and 1", lambda value: 0 < value < 1)]
LEAST_TEMPERATURE = 1e-30
"""Smallest sampling temperature: logits that are divided by a smaller one may overflow float32."""
_AT_LEAST = f"a finite number above 0, at least {LEAST_TEMPERATURE:g}"
Temperature = Annotated[float, Bound(_AT_LEAST, lambda value: LEAST_TEMPERATURE <= value < math.inf)]
TemperatureOr0 = Annotated[
    float, Bound(f"{_AT_LEAST}, or 0 (greedy)", lambda value: value == 0 or LEAST_TEMPERATURE <= value < math.inf)
]
Seed = Annotated[int, within(0, 2**32 - 1)]
"""What Python, NumPy and PyTorch all take."""
Threads = Annotated[int, within(1, 1024)]
Text = Annotated[str, Bound("at least one character", bool)]
SpecialTokensMean = Literal["parse", "text"]
"""Meaning of the text of a special token in a user's text: this token, or its characters."""
DEVICE = Bound("auto, cpu, cuda or cuda:N", lambda name: bool(re.fullmatch(r"auto|cpu|cuda(:\d+)?", name)))
Device = Annotated[str, DEVICE]

GENERATION: Mapping[str, Any] = {
    "max_new_tokens": Count,
    "max_length": Count,
    "num_return_sequences": Count,
    "no_repeat_ngram_size": Natural,
    "repetition_penalty": Positive,
    "encoder_repetition_penalty": Positive,
}
"""Types of arguments of transformers' `generate`, with their bounds; `SAMPLING` holds where a token is drawn."""
SAMPLING: Mapping[str, Any] = {
    "temperature": Temperature,
    "top_k": Natural,
    "top_p": ShareAbove0,
    "min_p": Share,
    "top_h": ShareAbove0,
    "typical_p": ShareAbove0,
    "epsilon_cutoff": ShareBelow1,
    "eta_cutoff": ShareBelow1,
}

COMMAS = "names with commas"
SEVERAL = "one word or several"
Names = Annotated[tuple[str, ...], COMMAS]
"""Written as one text with commas."""
Words = Annotated[tuple[str, ...], SEVERAL]
"""Takes the words up to the next option."""

NOT_AN_OPTION: Mapping[str, bool] = {"option": False}
"""Metadata of a field that the program fills in."""


def option_fields(cls: Any) -> list[dataclasses.Field[Any]]:
    """Returns the fields of a dataclass that are options or groups of options."""
    return [field for field in dataclasses.fields(cls) if field.metadata.get("option", True)]


@cache
def type_hints(cls: type, extras: bool = False) -> dict[str, Any]:
    """Returns the types of a dataclass's fields by name; with `extras` they keep their `Annotated` bounds."""
    return get_type_hints(cls, include_extras=extras)


def type_in_help(hint: Any) -> str:
    """Returns what the help text calls the type of an option."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if get_origin(hint) is tuple:
        return "list of texts"
    if get_args(hint):
        return " | ".join(map(type_in_help, get_args(hint)))
    return "path" if hint is Path else "null" if hint is type(None) else str(hint.__name__)


def metavar(name: str, hint: Any) -> str | None:
    """Returns what stands for the value of a list in the help text; None for other options, which have their name."""
    written = getattr(hint, "__metadata__", ())
    return (
        "NAME,NAME"
        if COMMAS in written
        else "WORD ..."
        if SEVERAL in written
        else name.upper()
        if get_origin(hint) is tuple
        else None
    )


def bounds(hint: Any) -> Iterator[Bound]:
    """Yields the bounds in a type that `type_hints` returned with extras."""
    yield from (extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Bound))
    for part in get_args(hint):
        yield from bounds(part)


def _fixed_texts(hint: Any) -> Iterator[Bound]:
    """Yields the bound of a `Literal`: one of several texts."""
    if get_origin(hint) is Literal:
        yield Bound(f"one of {', '.join(get_args(hint))}", lambda value: value in get_args(hint))
    else:
        for part in get_args(hint):
            yield from _fixed_texts(part)


_NO_NUL = Bound(
    "a text without the character NUL", lambda value: not isinstance(value, str | Path) or "\0" not in str(value)
)
"""Bound of every option: no path and no argument of a program can hold that character."""


def check(options: Any, prefix: str = "", cls: type | None = None) -> None:
    """Checks every bound of a tree of options; None is a value that is not given and passes.

    Args:
        options: Tree of dataclasses that holds the values.
        prefix: Text before the field names in messages, such as `model.`.
        cls: Dataclass that declares the fields to check; by default the type of `options`.

    Raises:
        ConfigError: for the first value that its bound does not allow.
    """
    cls = cls or type(options)
    for field in dataclasses.fields(cls):
        value, hint = getattr(options, field.name), type_hints(cls, True)[field.name]
        if dataclasses.is_dataclass(value):
            check(value, f"{prefix}{field.name}.")
        else:
            check_value(prefix + field.name, value, hint)


def check_value(name: str, value: Any, hint: Any) -> None:
    """Checks the value of one option; None is a value that is not given and passes.

    Args:
        name: Name of the option in messages.
        value: Value of the option's type; of a tuple each element is checked.
        hint: Type of the option with its bounds.

    Raises:
        ConfigError: A bound does not allow the value.
    """
    if value is None:
        return
    for one in value if isinstance(value, tuple) else (value,):
        for bound in (_NO_NUL, *_fixed_texts(hint), *bounds(hint)):
            bound.hold(name, one)
    if isinstance(value, int):
        _SIZED.hold(name, value)


def check_number(name: str, value: object, hint: Any, advice: str = "") -> Any:
    """Checks an argument that may be of any type, and returns it as a number of Python.

    Args:
        name: Name of the argument in messages.
        value: Value that the caller gave.
        hint: Type with bounds, such as `Count`.
        advice: Text that ends the message.

    Returns:
        An int or a float, as the type says; the value may be a number of NumPy, for example.

    Raises:
        ConfigError: It is not a number of this type, or a bound does not allow it.
    """
    whole = get_args(hint)[0] is int
    number: int | float | None = None
    if not isinstance(value, bool):
        with suppress(TypeError, OverflowError):
            if whole:
                number = operator.index(value)  # type: ignore[arg-type]  # or TypeError
            elif isinstance(value, Real):
                number = float(value)
    for bound in bounds(hint):
        if number is None or not bound.allows(number):
            kind = "a whole number of " if whole else "a number: " if number is None else ""
            raise ConfigError(f"{name}: got {shown(value)}, needs {kind}{bound.needs}{advice}")
    return number


def path_text(path: str | os.PathLike[str]) -> str:
    """Returns a path for a message, in which the character NUL, which ends a line in many programs, is escaped."""
    return os.fspath(path).replace("\0", "\\0")


def path_kind(path: str | os.PathLike[str], option: str) -> Literal["file", "directory", "other"] | None:
    """Finds out what is at a path that a user has given.

    Args:
        path: Path to look at; links are followed.
        option: Name of the option in the error message.

    Returns:
        `file`, `directory`, `other` (a device, pipe or socket), or None where there is nothing.

    Raises:
        ConfigError: The system does not say what is there: directories on the way that the user may not enter, a name
            that is too long, links in a circle, or a character that no name can have.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{option}: cannot look at {path_text(path)} ({reason}); needs a path that can be used"
        ) from None
    return "directory" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def check_input(path: str | os.PathLike[str], option: str, once: bool = False) -> None:
    """Checks that a path can be read from, without reading it. A path with nothing there is left to its reader.

    Args:
        path: Path of a file or directory, or of a pipe where it is read once.
        option: Name of the option in the error message.
        once: Whether the file is read a single time, from its beginning to its end, as a pipe needs it.

    Raises:
        ConfigError: This user may not read it, it is a device, which may have no end, or a pipe that would have to be
            read again.
    """
    kind = path_kind(path, option)
    if kind is None:
        return
    if kind == "other" and not (once and stat.S_ISFIFO(os.stat(path).st_mode)):
        usable = "a file or a pipe" if once else "a file or a directory"
        raise ConfigError(f"{option}: {path_text(path)} is a device, a pipe or a socket; needs {usable}")
    if not os.access(path, os.R_OK | (os.X_OK if kind == "directory" else 0)):
        raise ConfigError(
            f"{option}: cannot read {path_text(path)} ({os.strerror(errno.EACCES)}); needs a path that you may read"
        )


@dataclass(frozen=True)
class _Input(Bound):
    """Bound of an option that names what is read: see `check_input`."""

    once: bool = False

    def hold(self, name: str, value: Any) -> None:
        super().hold(name, value)
        check_input(value, name, self.once)


INPUT = _Input("a path that you may read", bool)
"""Bound of a path that may be read more than once."""
INPUT_ONCE = _Input("a path that you may read", bool, once=True)
"""Bound of a path that is read a single time, so that it may be a pipe."""


def check_name(path: str | os.PathLike[str], option: str) -> None:
    """Checks that a path is UTF-8 text: the libraries that read and write models can open no other.

    Raises:
        ConfigError: It is not.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{option}: {path_text(path)} is not UTF-8 text; needs a path that is") from None


def check_model_path(path: str | os.PathLike[str], option: str = "model.path") -> None:
    """Checks whether a model could be at a path; it does not ask a hub.

    Args:
        path: Path that should be a directory or a hub name.
        option: Name of the option in the error message.

    Raises:
        ConfigError: The path is not a directory and cannot be a hub name, or this user may not read a file there.
    """
    name = os.fspath(path)
    check_name(name, option)
    local = name.startswith((".", "~", os.sep)) or name.count("/") > 1
    kind = path_kind(name, option)
    if kind != "directory":
        if local or kind is not None:
            raise ConfigError(f"{option}: {name} is not a directory; a model is a directory or a hub name")
        return
    try:
        files = [entry.path for entry in os.scandir(name) if entry.is_file()]
    except OSError as error:
        raise ConfigError(f"{option}: cannot read {name} ({error.strerror})") from None
    for file in files:
        check_input(file, option)


_FOREIGN_WEIGHTS = {
    "*.gguf": "AutoModelForCausalLM.from_pretrained(DIRECTORY, gguf_file=FILE).save_pretrained(NEW)",
    "*.bin": "AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(NEW), if you trust the file's author",
    "*.h5": "in transformers 4, AutoModelForCausalLM.from_pretrained(DIRECTORY, from_tf=True).save_pretrained(NEW)",
    "*.msgpack": "in transformers 4, AutoModelForCausalLM.from_pretrained(DIRECTORY, from_flax=True)"
    ".save_pretrained(NEW)",
    **dict.fromkeys(
        ("*.ckpt", "*.pth", "*.pt", "*.ckpt.index", "consolidated*.safetensors"),
        "the script of transformers that converts this family's original weights",
    ),
}
"""Patterns of the names of weights that are not read, with what makes safetensors files of them."""
_OTHER_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state)")


def check_weights_format(path: str | os.PathLike[str], option: str = "model.path") -> None:
    """Checks that a model directory does not have its weights in another format than safetensors.

    Args:
        path: Directory to look at; what is no directory passes, as does a directory without any weights.
        option: Name of the option in the error message.

    Raises:
        ConfigError: It has them in another format; the message names a file and what converts it.
    """
    names: list[str] = []
    with suppress(OSError, ValueError):  # what cannot be listed is refused by who reads it
        names = sorted(os.listdir(path))
    foreign = {
        name: advice
        for pattern, advice in _FOREIGN_WEIGHTS.items()
        for name in fnmatch.filter(names, pattern)
        if not _OTHER_STATE.match(name)
    }
    if not foreign or set(fnmatch.filter(names, "*.safetensors")) - set(foreign):
        return
    name, advice = next(iter(foreign.items()))
    raise ConfigError(
        f"{option}: {os.fspath(path)} has its weights in {name}, which is not read; needs model.safetensors as "
        f"transformers writes it: {advice}"
    )


def parse_positions(positions: str, name: str = "positions") -> tuple[str, float]:
    """Reads `all`, `every:N` or `entropy:K`.

    Args:
        positions: Text to read. A count is written with digits alone: 1.0 could be a count or all of the text.
        name: Name of the option in the error message.

    Returns:
        The rule, and its number: N, a count K as a whole number or a fraction K below 1; 1 for `all`.

    Raises:
        ConfigError: Anything else.
    """
    POSITIONS.hold(name, positions)
    rule, _, number = positions.partition(":")
    return rule, float(number or 1)


def _are_positions(positions: str) -> bool:
    rule, _, number = positions.partition(":")
    try:
        value = float(number)
    except ValueError:
        return positions == "all"
    return (number.isdecimal() and value >= 1 and rule in ("every", "entropy")) or (rule == "entropy" and 0 < value < 1)


POSITIONS = Bound(
    "all, every:N (N at least 1), or entropy:K (K a count of at least 1, or a fraction between 0 and 1)", _are_positions
)
Positions = Annotated[str, POSITIONS]


Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """The thinking model to load, and how to load it.

    Args:
        checkpoint: Thinking model to load: a directory, a training run, or a hub name.
        device: Device to run the model on: `auto` (the first GPU, or the CPU if there is none), `cpu`, `cuda` or
            `cuda:N`.
        dtype: Type of the weights. Null: the type they are saved in.
        tokenizer: Directory of the tokenizer, for a checkpoint that does not include one.
    """

    checkpoint: str
    device: Device = "auto"
    dtype: Dtype | None = None
    tokenizer: str | None = None
