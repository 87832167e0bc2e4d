"""The readers of YAML and JSON, for files that anybody may have written: plain values within limits, or one error.

Both refuse text that is too large or nested too deeply, keys that are given twice, and what is not UTF-8. YAML has more
ways to go wrong: `parse_yaml` counts what the aliases of a text would expand to before it builds a value.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import UnionType
from typing import Any, BinaryIO, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from quietstar.errors import DataError

MAX_YAML_BYTES = 1 << 18
"""Longest YAML text, in bytes."""
MAX_YAML_SIZE = 1 << 20
"""Largest number of values and characters that a YAML text stands for, with every alias replaced by its value."""
MAX_JSON_BYTES = 1 << 25
"""Longest JSON text, in bytes: its values then take less than 1 GiB."""
MAX_DEPTH = 100
NOT_REGULAR = "is a pipe, a socket or a device, needs a file"
MAX_DIGITS = 100
"""Longest number in YAML, in characters."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LONG_NUMBER = re.compile(r"(?<!\d)\d{309}")  # looks once at each number
_OCTAL = re.compile(r"[-+]?0[0-7_]*[0-7][0-7_]*")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_PLAIN = {None, *(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map"))}
_MERGE = "tag:yaml.org,2002:merge"
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def shown(value: object) -> str:
    """Returns a value as an error message shows it: on one line, and cut off if it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]}... ({len(text):,} characters)"


@contextmanager
def open_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Context of a file that is open for reading bytes; what could keep its reader waiting is refused.

    Raises:
        DataError: It is a pipe, a socket or a device; the message has no file name.
        OSError: It cannot be opened.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise DataError(NOT_REGULAR)
        yield file


def read_lines(file: BinaryIO, limit: int) -> Iterator[bytes | None]:
    """Yields lines with their line breaks; None for one of more than `limit` bytes, which is passed over."""
    most = limit + 2  # a line of `limit` bytes with its line break
    while line := file.readline(most):
        whole = line.endswith(b"\n") or len(line) < most
        if whole and len(line.rstrip(b"\r\n")) <= limit:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(65_536)
        yield None


def parse_yaml(content: bytes | str, place: str) -> Any:
    """Reads one YAML document.

    Dates are texts here. Numbers in base 60 (`1:30`) and octal ones (`010`) are refused: to YAML 1.2 they are a text
    and ten.

    Args:
        content: YAML text, in UTF-8.
        place: Name of the file for messages; the number of the line follows it.

    Returns:
        Plain values; None for an empty document.

    Raises:
        DataError: The text is not valid YAML, or beyond the limits of this module.
    """
    text = _decoded(content, place, MAX_YAML_BYTES)
    try:
        _check_events(text)
        loader = _PlainLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            _check_keys(loader, root)
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", error)
        raise DataError(f"{place}{line}: not valid YAML: {' '.join(str(problem).split())[:200]}") from None
    except RecursionError:
        raise DataError(f"{place}: not usable YAML: nested too deeply") from None


def parse_json(content: bytes | str, *, limit: int = MAX_JSON_BYTES, surrogates: bool = False, **hooks: Any) -> Any:
    """Reads one JSON document.

    Args:
        content: JSON text, in UTF-8, with or without a byte order mark.
        limit: Longest text, in bytes or characters.
        surrogates: Whether a string may have lone surrogates, which cannot be written as UTF-8.
        hooks: Arguments `parse_int` and `parse_float` of `json.loads`.

    Returns:
        Plain values, or what the hooks make of numbers.

    Raises:
        DataError: The text is not valid JSON, or beyond the limits of this module; the message has no file name.
    """
    try:
        text = _decoded(content, "", limit, surrogates)
        value = json.loads(text, object_pairs_hook=_object, **hooks)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in error.doc.rstrip("\n") else ""
        raise DataError(f"not valid JSON: {error.msg.removesuffix(' at')} at {line}column {error.colno}") from None
    except RecursionError:
        raise DataError("not usable JSON: nested too deeply") from None
    except DataError:
        raise
    except ValueError:  # Python converts no more than 4,300 digits
        raise DataError("not usable JSON: a whole number has more than 307 digits") from None
    deep = text.count("[") + text.count("{") > MAX_DEPTH
    if deep or _LONG_NUMBER.search(text) or (not surrogates and _SURROGATE.search(text)):
        _check_values(value, surrogates)
    return value


def read_json_file(path: str | os.PathLike[str], *, surrogates: bool = False) -> Any:
    """Reads the JSON document in a file, of which no more than the limit is ever in memory.

    Args:
        path: File to read.
        surrogates: Whether a string may have lone surrogates, as `parse_json` has it.

    Returns:
        Plain values.

    Raises:
        DataError: It is no regular file, is not valid JSON, or is beyond the limits of this module; the message has no
            file name.
        OSError: The file cannot be read.
    """
    with open_file(path) as file:
        return parse_json(file.read(MAX_JSON_BYTES + 1), surrogates=surrogates)


def _decoded(content: bytes | str, place: str, limit: int, surrogates: bool = False) -> str:
    start = f"{place}: " if place else ""
    if len(content) > limit:
        raise DataError(f"{start}has more than {limit:,} bytes, needs at most as many")
    if isinstance(content, str):
        if not surrogates and not _is_utf8(content):
            raise DataError(f"{start}not UTF-8 text: it has a lone surrogate, which is not a character")
        return content.removeprefix("\ufeff")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{start}not UTF-8 text: {error.reason} at byte {error.start + 1}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        times = Counter(name for name, _ in pairs)
        twice = next(name for name in times if times[name] > 1)
        raise DataError(f"not usable JSON: the key {shown(twice)} is given twice")
    return values


def _check_values(root: Any, surrogates: bool) -> None:
    """Refuses depth, integers beyond any float, and lone surrogates."""
    level: list[Any] = [root]
    for depth in range(MAX_DEPTH + 1):
        inside: list[Any] = []
        if depth == MAX_DEPTH and any(isinstance(value, dict | list) for value in level):
            raise DataError("not usable JSON: nested too deeply")
        for value in level:
            if isinstance(value, dict):
                inside += value.values()
                inside += value
            elif isinstance(value, list):
                inside += value
            elif isinstance(value, str) and not surrogates and not _is_utf8(value):
                raise DataError("not usable JSON: a string has a lone surrogate, which is not a character")
            elif isinstance(value, int) and value.bit_length() > 1023:
                raise DataError("not usable JSON: a whole number has more than 307 digits")
        level = inside


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _PlainLoader(_Loader):  # type: ignore[misc]  # the faster one of two classes, where it is installed
    """PyYAML's safe loader, which raises nothing but YAMLError."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS:
            if len(node.value) > MAX_DIGITS:
                raise _problem(f"a number of {len(node.value):,} characters, needs at most {MAX_DIGITS}", node)
            if ":" in node.value:
                raise _problem(f"{node.value} is a number in base 60; put a text into quotes", node)
            if _OCTAL.fullmatch(node.value):
                raise _problem(f"{node.value} is octal in YAML 1.1 alone; needs no zero in front, or quotes", node)
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
            kind = str(node.tag).rpartition(":")[2]
            raise _problem(f"{shown(node.value)[:100]} is no {kind} ({error})", node) from None


_PlainLoader.yaml_constructors = {tag: make for tag, make in _Loader.yaml_constructors.items() if tag in _PLAIN}
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def _problem(text: str, node: Any) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark)


def _check_events(text: str) -> None:
    """Refuses a text that would become too large or too deep a value, and an alias inside its own value."""
    finished: dict[str | None, tuple[int, int]] = {}  # size and height of each value with an anchor
    open_values: list[tuple[str | None, int, int]] = []  # anchor, size and height so far
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_values.append((event.anchor, 1, 0))
            size, height = 0, 0
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size, height = open_values.pop()
            height += 1
            if anchor is not None:
                finished[anchor] = size, height
        elif isinstance(event, yaml.ScalarEvent):
            size, height = 1 + len(event.value), 0
            if "\0" in event.value or not _is_utf8(event.value):
                raise _problem("a text with a NUL character or a lone surrogate", event)
            if event.anchor is not None:
                finished[event.anchor] = size, height
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _, _ in open_values):
                raise _problem(f"*{event.anchor} stands inside the value that it repeats", event)
            size, height = finished.get(event.anchor, (1, 0))  # an unknown one is refused by the composer
        else:
            continue
        if open_values:
            anchor, before, highest = open_values[-1]
            open_values[-1] = anchor, before + size, max(highest, height)
            if before + size > MAX_YAML_SIZE:
                raise _problem(f"its aliases stand for more than {MAX_YAML_SIZE:,} values and characters", event)
        if len(open_values) + height > MAX_DEPTH:
            raise _problem(f"nested too deeply, needs at most {MAX_DEPTH} levels", event)


def _check_keys(loader: Any, root: yaml.Node) -> None:
    """Refuses a mapping with a key that is given twice, or that is no single value."""
    for node in _mappings(root):
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _problem("a key that is a list or a mapping", key_node)
            if key_node.tag == _MERGE:
                continue
            key = loader.construct_object(key_node)
            if key in lines:
                raise _problem(f"the key {shown(key)} is given twice, the first time in line {lines[key]}", key_node)
            lines[key] = key_node.start_mark.line + 1


def _mappings(root: yaml.Node) -> Iterator[yaml.MappingNode]:
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield node
            waiting += [value for _, value in node.value]
        else:
            waiting += node.value


def check_type(value: object, hint: Any, name: str) -> None:
    """Checks a plain value against a type hint.

    Args:
        value: Value that `parse_json` or `parse_yaml` returned.
        hint: One of `Any`, `None`, `bool`, `int`, `float` (which takes whole numbers too), `str`, lists, tuples of any
            length (a list too), dicts with texts as keys, unions, and dataclasses: an object with at least their
            fields, as far as these have no default.
        name: Name of the value for messages; empty for the object of a whole file, whose fields stand for themselves.

    Raises:
        DataError: The value has another type; the message names the first place that has.
    """
    arguments, prefix = get_args(hint), f"{name}." if name else ""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints = _hints(hint)
        for field in dataclasses.fields(hint):
            needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if needed and field.name not in value:
                raise DataError(f"{name}: {field.name} is missing" if name else f"{field.name}: is missing")
            if field.name in value:
                check_type(value[field.name], hints[field.name], prefix + field.name)
    elif get_origin(hint) is Literal:
        if value not in arguments:
            raise DataError(f"{name}: got {shown(value)}, needs one of {', '.join(map(str, arguments))}")
    elif get_origin(hint) in (list, tuple) and isinstance(value, list):
        for number, one in enumerate(value):
            check_type(one, arguments[0], f"{name}[{number}]")
    elif get_origin(hint) is dict and isinstance(value, dict):
        for key, one in value.items():
            check_type(one, arguments[1], f"{prefix}{key}")
    elif get_origin(hint) in (Union, UnionType):
        options = [one for one in arguments if _has_kind(value, one)]
        if not options:
            raise DataError(f"{name}: got {shown(value)}, needs {' or '.join(map(_in_words, arguments))}")
        check_type(value, options[0], name)
    elif not _has_kind(value, hint):
        raise DataError(f"{name}: got {shown(value)}, needs {_in_words(hint)}")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _has_kind(value: object, hint: Any) -> bool:
    """Returns whether a value has a type, without a look at what is inside it."""
    if hint is Any:
        return True
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    kind = dict if dataclasses.is_dataclass(hint) else get_origin(hint) or hint
    kind = list if kind is tuple else kind
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _in_words(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    return names.get(hint, "a list" if get_origin(hint) in (list, tuple) else "an object")
