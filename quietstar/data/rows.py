"""Rows of a file: read in bounded memory, turned into texts one at a time, and skipped or refused where unusable."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

from quietstar.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

SHOWN = 20
"""Skipped rows that each get a warning; further ones are only counted."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a JSON lines file or one row of a table, as it was read.

    Args:
        source: File that the row comes from.
        index: Place of the row in the file, from 0.
        content: Bytes of the line, or UTF-8 text of the column; None where the row is too long or null.
        problem: Reason why there is no content.
        is_json: Whether the content is a JSON object; otherwise it is the text itself.
    """

    source: str
    index: int
    content: bytes | None
    problem: str = ""
    is_json: bool = True

    @property
    def place(self) -> str:
        """`file:line`, the line counted from 1."""
        return f"{self.source}:{self.index + 1}"


def read_json_rows(file: BinaryIO, source: str, start: int, limit: int) -> Iterator[Row]:
    """Yields the lines of a file from line `start` on, blank ones included.

    Args:
        file: File of JSON lines, open for reading bytes.
        source: Name of the file in messages.
        start: First line to yield, counted from 0.
        limit: Most bytes of a line. A longer one becomes a row without content, and is never in memory as a whole.
    """
    for index, line in enumerate(_read_lines(file, limit)):
        if index < start:
            continue
        if line is None:
            yield Row(source, index, None, too_long(limit))
        else:
            yield Row(source, index, line.removeprefix(BYTE_ORDER_MARK) if index == 0 else line)


def too_long(limit: int) -> str:
    """Returns the reason for refusing a row that is longer than `data.max_row_bytes`."""
    return f"longer than {limit} bytes (data.max_row_bytes)"


def _read_lines(file: BinaryIO, limit: int) -> Iterator[bytes | None]:
    most = limit + 2  # a line of `limit` bytes with its line break
    while line := file.readline(most):
        whole = line.endswith(b"\n") or len(line) < most
        if whole and len(line.rstrip(b"\r\n")) <= limit:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(65_536)
        yield None


def text_of(row: Row, field: str) -> str | None:
    """Returns the text of a row, with `\\n` for every kind of line break; None for a blank line.

    Args:
        row: One row as it was read from a file.
        field: Field of a JSON object that holds the text.

    Raises:
        BadRow: The row has no usable text.
    """
    if row.content is None:
        raise BadRow(row.problem)
    if not row.is_json:
        return _checked(decode(row.content), f"column {field!r}")
    if not row.content.strip():
        return None
    return _checked(_field_of(decode(row.content.rstrip()), field), f"field {field!r}")


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


def _field_of(line: str, field: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRow(f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
    except ValueError as error:  # an integer with more digits than Python converts
        raise BadRow(f"not usable JSON: {error}") from None
    except RecursionError:
        raise BadRow("not usable JSON: nested too deeply") from None
    if not isinstance(record, dict):
        raise BadRow(f"holds a JSON {_json_type(record)}, needs an object with the field {field!r}")
    if field not in record:
        fields = ", ".join(repr(name) for name in list(record)[:10]) or "none"
        raise BadRow(f"has no field {field!r} (its fields: {fields}); data.field names the one to read")
    text = record[field]
    if not isinstance(text, str):
        raise BadRow(f"field {field!r} is a JSON {_json_type(text)}, needs a string")
    return text


def _checked(text: str, what: str) -> str:
    if not text or text.isspace():
        raise BadRow(f"{what} has no text in it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair, which is not a character
        raise BadRow(f"{what} is not valid Unicode at character {error.start}") from None
    return _normalise_line_breaks(text)


def _normalise_line_breaks(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


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
    """

    def __init__(self, policy: Literal["stop", "skip"] = "stop", limit: int = 100) -> None:
        self._policy = policy
        self._limit = limit
        self.count = 0

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
