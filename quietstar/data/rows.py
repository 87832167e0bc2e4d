"""Rows of a file: read in bounded memory, turned into texts one at a time, and skipped or refused where unusable.

`read_json_rows` and `read_json_elements` read JSON lines and an array. `text_of` returns the text of a row, or of a
chat in it.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

from quietstar.config.parsing import parse_json, read_lines
from quietstar.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

SHOWN = 20
"""Skipped rows that each get a warning; further ones are only counted."""

NAMED = 20
"""Most fields of a row that a message names."""

CHUNK = 65_536

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
"""Roles of a chat whose messages have the keys `from` and `value`, and their usual names."""

Messages = list[dict[str, str]]
Unit = Literal[":", ": element ", ""]
"""What a row is in its file: a line or row of a table, an element of an array, or the whole file."""

_STRUCTURE = re.compile(rb'["\[\]{},]')
_IN_STRING = re.compile(rb'\\.?|"', re.DOTALL)


@dataclass(frozen=True)
class OptionNames:
    """Names of the options that messages advise to change; the defaults are those of training.

    Args:
        path: Option that names the files.
        field: Option that names the field of a row.
        special_tokens: Option that says what the text of a special token is.
        max_row_bytes: Option that bounds a row; empty where none does.
        length: Option that says how many tokens a text has.
        tokenizer: Option that names the tokenizer.
    """

    path: str = "data.path"
    field: str = "data.field"
    special_tokens: str = "data.special_tokens"
    max_row_bytes: str = "data.max_row_bytes"
    length: str = "data.length"
    tokenizer: str = "model.path"


TRAINING = OptionNames()


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file, as it was read: a line of JSON, an element of an array, a row of a table, or a whole text.

    Args:
        source: File that the row comes from.
        index: Place of the row in the file, from 0.
        content: Bytes of the JSON value, or UTF-8 text; None where the row is too long, null or unusable.
        problem: Reason why there is no content.
        is_json: Whether the content is a JSON object; otherwise it is the text itself.
        line: Line of the file where the row ends, if another one than its index says.
        unit: What the row is in its file.
    """

    source: str
    index: int
    content: bytes | None
    problem: str = ""
    is_json: bool = True
    line: int = 0
    unit: Unit = ":"

    @property
    def number(self) -> int:
        """Number of the line, element or row in its file, from 1."""
        return self.line or self.index + 1

    @property
    def place(self) -> str:
        """`file:line`, `file: element n`, or `file`, counted from 1."""
        return f"{self.source}{self.unit}{self.number}" if self.unit else self.source


def read_json_rows(file: BinaryIO, source: str, start: int, limit: int) -> Iterator[Row]:
    """Yields the lines of a file from line `start` on, blank ones included.

    Args:
        file: File of JSON lines, open for reading bytes.
        source: Name of the file in messages.
        start: First line to yield, counted from 0.
        limit: Most bytes of a line. A longer one becomes a row without content, and is never in memory as a whole.
    """
    for index, line in enumerate(read_lines(file, limit)):
        if index < start:
            continue
        if line is None:
            yield Row(source, index, None, too_long(limit))
        else:
            yield Row(source, index, line.removeprefix(BYTE_ORDER_MARK) if index == 0 else line)


def read_json_elements(file: BinaryIO, source: str, start: int, limit: int) -> Iterator[Row]:
    """Yields the elements of a JSON array from element `start` on, unparsed.

    Args:
        file: File with one array, open for reading bytes.
        source: Name of the file in messages.
        start: First element to yield, counted from 0.
        limit: Most bytes of an element. A longer one becomes a row without content, and is never in memory as a whole.

    Raises:
        DataError: The file ends within the array, or goes on after it.
    """
    for index, element in enumerate(_read_elements(file, source, limit)):
        if index >= start:
            problem = too_long(limit) if element is None else ""
            yield Row(source, index, element, problem, unit=": element ")


def _read_elements(file: BinaryIO, source: str, limit: int) -> Iterator[bytes | None]:
    """Finds where elements end by brackets and strings alone, so that a broken element does not hide the next one."""
    element = bytearray()
    depth, size, in_string, escaped, first, after_comma = 0, 0, False, False, True, False
    while chunk := file.read(CHUNK):
        begin, place = 0, 1 if escaped else 0
        escaped = False
        while found := (_IN_STRING if in_string else _STRUCTURE).search(chunk, place):
            mark, place = found[0], found.end()
            if depth == 0 and not (first and mark == b"["):
                break
            first = False
            if mark == b'"':
                in_string = not in_string
            elif in_string:
                escaped = mark == b"\\"  # at the end of the chunk: what it escapes is in the next one
            elif mark in b"[{":
                depth += 1
                if depth == 1:
                    begin = place
            else:
                depth -= mark != b","
                if depth == 0 or (depth == 1 and mark == b","):
                    part = chunk[begin : place - 1]
                    size += len(part)
                    element += part if size <= limit else b""
                    if element.strip() or mark == b"," or after_comma:  # otherwise an empty array
                        yield bytes(element.strip()) if size <= limit else None
                    element, size, begin, after_comma = bytearray(), 0, place, mark == b","
        size += len(chunk) - begin
        if depth == 0:
            if chunk[begin:].strip(b" \t\r\n" + BYTE_ORDER_MARK):
                raise DataError(
                    f"{source}: not valid JSON: the file goes on after its array, or does not begin with one"
                )
        elif size <= limit:
            element += chunk[begin:]
        else:
            element.clear()
    if depth:
        raise DataError(f"{source}: not valid JSON: the file ends within its array; it is not whole")


LONGER = "longer than {} bytes"


def too_long(limit: int) -> str:
    """Returns the reason for refusing a row that is too long."""
    return LONGER.format(limit)


def _unusable(row: Row, option: str) -> BadRow:
    """Returns the error for a row without content, which names the option that bounds rows, if there is one."""
    named = f" ({option})" if option and row.problem.startswith(LONGER.partition("{")[0]) else ""
    return BadRow(row.problem + named)


Render = Callable[[Messages], str]
"""Function that makes the text of a chat."""


class Chat(str):
    """The contents of a chat's messages, of which a tokenizer's template has yet to make a text.

    Attributes:
        messages: Messages of the chat, each with role and content.
    """

    messages: Messages


def unrendered(messages: Messages) -> Chat:
    """Returns a chat as it was read, for a tokenizer that is loaded later."""
    chat = Chat("\n".join(message["content"] for message in messages))
    chat.messages = messages
    return chat


def text_of(
    row: Row, field: str, render: Render | None = None, names: OptionNames = TRAINING, *, may_be_empty: bool = False
) -> str | None:
    """Returns the text of a row, with `\n` for every kind of line break; None for a blank line.

    Args:
        row: One row as it was read from a file.
        field: Field of a JSON object that holds the text or a chat; `meta.text` and `turns.0.content` are inside
            others.
        render: Function that makes the text of a chat; None refuses chats.
        names: Names of the options that messages advise to change.
        may_be_empty: Whether a text may be empty or white space.

    Raises:
        BadRow: The row has no usable text.
    """
    if row.content is None:
        raise _unusable(row, names.max_row_bytes)
    if not row.is_json:
        text = decode(row.content.removeprefix(BYTE_ORDER_MARK))
        if not row.unit and not may_be_empty and (not text or text.isspace()):
            raise BadRow(no_text(len(row.content)))
        return _checked(text, f"column {field!r}", may_be_empty)
    record = object_of(row, f"with the field {field!r}")
    if record is None:
        return None
    value = field_of(record, field, names.field)
    if isinstance(value, str):
        return _checked(value, f"field {field!r}", may_be_empty)
    if _is_chat(value):
        if render is None:
            raise BadRow(f"field {field!r} holds a chat, which is not read here; needs a string")
        return render(_messages(value, field))
    chats = " or a chat (objects with role and content)" if isinstance(value, list) and render else ""
    raise BadRow(f"field {field!r} is a JSON {json_type(value)}, needs a string{chats}")


def no_text(size: int) -> str:
    """Returns the reason for refusing a file without text."""
    return f"no text in it ({size} bytes, all white space)"


def object_of(row: Row, needed: str, number: Callable[[str], Any] | None = None) -> dict[str, Any] | None:
    """Returns the JSON object of a row; None for a blank line.

    Args:
        row: One row as it was read from a file.
        needed: What the object must have, for the message.
        number: Function that makes a value of the text of a number; None makes int and float.

    Raises:
        BadRow: The row is not a JSON object.
    """
    if row.content is None:
        raise _unusable(row, "")
    if not row.is_json:
        raise BadRow(f"is a text, needs a JSON object {needed}")
    if not row.content.strip():
        if row.unit == ": element ":
            raise BadRow("not valid JSON: a comma without an element beside it")
        return None
    line = decode(row.content.rstrip())
    try:
        # the reader of the file has bounded the row
        record = parse_json(line, limit=len(line), surrogates=True, parse_float=number, parse_int=number)
    except DataError as error:
        raise BadRow(f"{error}; needs one object per line, or an array of them") from None
    if not isinstance(record, dict):
        raise BadRow(f"holds a JSON {json_type(record)}, needs an object {needed}")
    return record


_MISSING = object()


def field_of(record: Mapping[str, Any], field: str, option: str = TRAINING.field) -> Any:
    """Returns the value of a field, which may be inside others.

    Args:
        record: One JSON object.
        field: Name of the field, or names and numbers of list elements with dots between; a name that has the dot
            itself comes first.
        option: Option that names the field, for the message.

    Raises:
        BadRow: There is no such field; the message names those that there are.
    """
    value = _find(record, field)
    if value is _MISSING:
        names = list(_names(record))
        shown = ", ".join(map(repr, names[:NAMED])) + (", ..." if len(names) > NAMED else "") or "none"
        raise BadRow(f"has no field {field!r} (its fields: {shown}); {option} names the one to read")
    return value


def _find(value: Any, field: str) -> Any:
    if isinstance(value, list):
        first, dot, rest = field.partition(".")
        if not (first.isascii() and first.isdecimal() and len(first) < 10 and int(first) < len(value)):
            return _MISSING
        return _find(value[int(first)], rest) if dot else value[int(first)]
    if not isinstance(value, Mapping):
        return _MISSING
    if field in value:
        return value[field]
    end = len(field)
    while (end := field.rfind(".", 0, end)) >= 0:
        if field[:end] in value and (found := _find(value[field[:end]], field[end + 1 :])) is not _MISSING:
            return found
    return _MISSING


def _names(record: Mapping[str, Any], before: str = "", depth: int = 3) -> Iterator[str]:
    for name, value in record.items():
        if isinstance(value, dict) and value and depth > 1:
            yield from _names(value, f"{before}{name}.", depth - 1)
        else:
            yield before + name


def _is_chat(value: Any) -> bool:
    return (
        bool(value)
        and isinstance(value, list)
        and all(isinstance(message, dict) and ("role" in message or "from" in message) for message in value)
    )


def _messages(chat: list[dict[str, Any]], field: str) -> Messages:
    found = []
    for number, message in enumerate(chat):
        place = f"{field}.{number}"
        role, content = (
            message.get(name) for name in (("role", "content") if "role" in message else ("from", "value"))
        )
        if "role" not in message:
            role = ROLES.get(role) if isinstance(role, str) else None
            if role is None:
                raise BadRow(f"{place}.from is {message['from']!r}, needs one of {', '.join(ROLES)}")
        if not isinstance(role, str) or not role:
            raise BadRow(f"{place}.role is a JSON {json_type(role)}, needs a string")
        if message.get("tool_calls"):
            raise BadRow(f"{place} has tool calls, which are not read; needs text alone")
        if isinstance(content, list):
            content = "".join(_part(part, f"{place}.content.{index}") for index, part in enumerate(content))
        if not isinstance(content, str):
            raise BadRow(f"{place} has content of the type {json_type(content)}, needs a string or parts of type text")
        _check_unicode(content, f"{place}.content")
        found.append({"role": role, "content": _normalise_line_breaks(content)})
    if not any(message["content"].strip() for message in found):
        raise BadRow(f"field {field!r} has no text in it")
    return found


def _part(part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else json_type(part)
    raise BadRow(f"{place} is a part of the type {kind!r}, needs text")


def decode(content: bytes) -> str:
    """Decodes UTF-8 bytes, with `\\n` for every kind of line break.

    Raises:
        BadRow: The bytes are not UTF-8.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = error.start - content.rfind(b"\n", 0, error.start)
        reason = f"not UTF-8 text: {error.reason}, 0x{content[error.start]:02x} at byte {byte} of the line"
        raise BadRow(reason, content.count(b"\n", 0, error.start)) from None
    return _normalise_line_breaks(text)


def _checked(text: str, what: str, may_be_empty: bool = False) -> str:
    if not may_be_empty and (not text or text.isspace()):
        raise BadRow(f"{what} has no text in it")
    _check_unicode(text, what)
    return _normalise_line_breaks(text)


def _check_unicode(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair, which is not a character
        raise BadRow(f"{what} is not valid Unicode at character {error.start}") from None


def _normalise_line_breaks(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def json_type(value: object) -> str:
    """Returns what JSON calls the type of a value; a number may be of a class of its own."""
    kinds = {dict: "object", list: "array", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return kinds.get(type(value), "string" if type(value) is str else "number")


class BadRow(Exception):
    """A row cannot be used. The exception does not say where the row is, because the caller knows.

    Args:
        reason: Reason in words, for a message.
        line: Line of the problem within the content, from 0.
    """

    def __init__(self, reason: str, line: int = 0) -> None:
        super().__init__(reason)
        self.line = line


class BadRows:
    """Stops at the first row that cannot be used, or skips up to a number of such rows.

    Args:
        policy: Treatment of a bad row: `stop` raises an error, `skip` skips and counts it.
        limit: Largest number of rows that may be skipped.

    Attributes:
        count: Number of rows skipped so far.
        special: Number of times that the text of a special token was found in rows so far.
    """

    def __init__(self, policy: Literal["stop", "skip"] = "stop", limit: int = 100) -> None:
        self._policy = policy
        self._limit = limit
        self.count = 0
        self.special = 0

    def found_special(self, place: str, times: int, means: str) -> None:
        """Counts texts of special tokens, with a warning for the first.

        Args:
            place: Place of the row, as `file` or `file:line`.
            times: Number of times that the row has any.
            means: What becomes of them, for the message.
        """
        if times and not self.special:
            here = f" ({times} times)" if times > 1 else ""
            warnings.warn(f"{place}: {means}{here}; further ones are counted without a message", stacklevel=2)
        self.special += times

    def tell_special(self) -> None:
        """Says on standard error how many texts of special tokens there were, where there was more than the first."""
        if self.special > 1:
            print(f"{self.special} texts of special tokens in all", file=sys.stderr)

    def report(self, place: str, reason: str) -> None:
        """Counts a bad row, with a warning for each of the first ones.

        Args:
            place: Place of the row, as `file` or `file:line`.
            reason: Reason why the row cannot be used.

        Raises:
            DataError: The policy is to stop, or more rows than the limit have been skipped.
        """
        message = f"{place}: {reason}"
        if self._policy == "stop":
            raise DataError(message)
        self.count += 1
        if self.count > self._limit:
            raise DataError(
                f"{self.count} rows cannot be used, more than data.max_bad_rows allows ({self._limit}); "
                f"the last one is {message}"
            )
        if self.count <= SHOWN:
            last = "; further ones are counted without a message" if self.count == SHOWN else ""
            warnings.warn(f"{message} (row skipped{last})", stacklevel=2)
