"""Rows of a file, read in bounded memory and turned into texts one at a time.

What happens to a row of the data that cannot be used.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

from quietstar.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a JSON lines file or one row of a table, as it was read.

    Args:
        source: The file it comes from.
        index: Its place there, from 0.
        content: The line, or the UTF-8 text of the column; None: it is too long or null.
        problem: Why there is no content.
        is_json: Whether the content is a JSON object or the text itself.
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
    """The lines of a file from line `start` (from 0) on, blank ones included; lines before it are not looked into.

    Args:
        file: An open file.
        source: Its name.
        start: The first line to give.
        limit: A line with more bytes becomes a row without content; it is never held in memory as a whole.
    """
    for index, line in enumerate(_read_lines(file, limit)):
        if index < start:
            continue
        if line is None:
            yield Row(source, index, None, too_long(limit))
        else:
            yield Row(source, index, line.removeprefix(BYTE_ORDER_MARK) if index == 0 else line)


def too_long(limit: int) -> str:
    """The reason of a row that is longer than `data.max_row_bytes`."""
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
    """The text of a row, with `\\n` for every kind of line break; None for a blank line.

    Args:
        row: The row.
        field: The field of a JSON object that holds the text.

    Raises:
        BadRow: There is no text in it that could be used.
    """
    if row.content is None:
        raise BadRow(row.problem)
    if not row.is_json:
        return _checked(decode(row.content), f"column {field!r}")
    if not row.content.strip():
        return None
    return _checked(_field_of(decode(row.content.rstrip()), field), f"field {field!r}")


def decode(content: bytes) -> str:
    """UTF-8 bytes as text, with `\\n` for every kind of line break.

    Raises:
        BadRow: They are no UTF-8.
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
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair, which is no character
        raise BadRow(f"{what} is not valid Unicode at character {error.start}") from None
    return _normalise_line_breaks(text)


def _normalise_line_breaks(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


SHOWN = 20
"""Skipped rows that are told one by one; the others are counted."""


class BadRow(Exception):
    """Why a row cannot be used, without saying where it is: whoever reads the rows knows that.

    Args:
        reason: In words.
        line: The line, from 0, where there are several.
    """

    def __init__(self, reason: str, line: int = 0) -> None:
        super().__init__(reason)
        self.line = line


class BadRows:
    """Stops at the first row that cannot be used, or skips it, up to a number of them.

    Args:
        policy: `stop` or `skip`.
        limit: So many rows may be skipped.

    Attributes:
        count: Rows skipped so far.
    """

    def __init__(self, policy: Literal["stop", "skip"] = "stop", limit: int = 100) -> None:
        self._policy = policy
        self._limit = limit
        self.count = 0

    def report(self, place: str, reason: str) -> None:
        """Takes note of a row.

        Args:
            place: `file` or `file:line`.
            reason: Why it cannot be used.

        Raises:
            DataError: The policy is to stop, or it is one row too many.
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
