"""How options are declared: as fields of a dataclass, each with its type, default, bound, and a line of its docstring.

`Annotated[int, at_least(2)]`, or one of the types below, bounds a field. `check` holds every bound of a tree of such
dataclasses, and `--help` shows it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from quietstar.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Bound:
    """What a value has to be besides its type; of a list, each of its elements.

    Args:
        needs: In words that follow "needs".
        allows: Whether a value is such a one.
    """

    needs: str
    allows: Callable[[Any], bool]

    def hold(self, name: str, value: Any) -> None:
        """Refuses what is not allowed.

        Raises:
            ConfigError: naming the option, the value, and what is needed.
        """
        if not self.allows(value):
            got = "an empty text" if value == "" else repr(value)
            raise ConfigError(f"{name}: got {got}, needs {self.needs}")


def at_least(least: int) -> Bound:
    """Of whole numbers."""
    return Bound(f"at least {least}", lambda value: value >= least)


def within(low: float, high: float) -> Bound:
    """Of numbers, both ends included."""
    return Bound(f"{low} to {high}", lambda value: low <= value <= high)


Count = Annotated[int, at_least(1)]
Natural = Annotated[int, at_least(0)]
Finite = Annotated[float, Bound("a finite number", math.isfinite)]
Positive = Annotated[float, Bound("a finite number above 0", lambda value: 0 < value < math.inf)]
NonNegative = Annotated[float, Bound("a finite number of at least 0", lambda value: 0 <= value < math.inf)]
Share = Annotated[float, within(0, 1)]
ShareBelow1 = Annotated[float, Bound("at least 0 and less than 1", lambda value: 0 <= value < 1)]
ShareAbove0 = Annotated[float, Bound("more than 0 and at most 1", lambda value: 0 < value <= 1)]
ProperShare = Annotated[float, Bound("a share between 0 and 1", lambda value: 0 < value < 1)]
Text = Annotated[str, Bound("at least one character", bool)]
DEVICE = Bound("auto, cpu, cuda or cuda:N", lambda name: bool(re.fullmatch(r"auto|cpu|cuda(:\d+)?", name)))
Device = Annotated[str, DEVICE]

COMMAS = "names with commas"
SEVERAL = "one word or several"
Names = Annotated[tuple[str, ...], COMMAS]
"""Written as one text with commas."""
Words = Annotated[tuple[str, ...], SEVERAL]
"""Takes the words up to the next option."""

NOT_AN_OPTION: Mapping[str, bool] = {"option": False}
"""Metadata of a field that the program fills in."""


def option_fields(cls: Any) -> list[dataclasses.Field[Any]]:
    """The fields that are options or groups of options."""
    return [field for field in dataclasses.fields(cls) if field.metadata.get("option", True)]


@cache
def type_hints(cls: type, extras: bool = False) -> dict[str, Any]:
    """The types of a dataclass's fields, with `Annotated` or without."""
    return get_type_hints(cls, include_extras=extras)


def bounds(hint: Any) -> Iterator[Bound]:
    """The bounds in a type of `type_hints` with extras."""
    yield from (extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Bound))
    for part in get_args(hint):
        yield from bounds(part)


def _fixed_texts(hint: Any) -> Iterator[Bound]:
    """The same for a type that is one of several texts."""
    if get_origin(hint) is Literal:
        yield Bound(f"one of {', '.join(get_args(hint))}", lambda value: value in get_args(hint))
    else:
        for part in get_args(hint):
            yield from _fixed_texts(part)


def check(options: Any, prefix: str = "", cls: type | None = None) -> None:
    """Holds every bound; None is a value that is not given.

    Args:
        options: A tree of dataclasses.
        prefix: What stands before the names of its fields in messages, such as `model.`.
        cls: The dataclass whose fields are meant; by default that of `options`.

    Raises:
        ConfigError: for the first value that its bound does not allow.
    """
    cls = cls or type(options)
    for field in dataclasses.fields(cls):
        value, hint = getattr(options, field.name), type_hints(cls, True)[field.name]
        if dataclasses.is_dataclass(value):
            check(value, f"{prefix}{field.name}.")
        elif value is not None:
            for bound in (*_fixed_texts(hint), *bounds(hint)):
                for one in value if isinstance(value, tuple) else (value,):
                    bound.hold(prefix + field.name, one)
