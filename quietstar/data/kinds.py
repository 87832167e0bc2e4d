"""One file of data: its kind, by its ending and its content, which must agree, and its rows.

`KINDS` has the endings, upper or lower case, that one of `PACKED` may follow. `read_rows` reads a file of any kind.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib
import io
import json
import lzma
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal, cast

import numpy as np

from quietstar.data.rows import (
    BYTE_ORDER_MARK,
    TRAINING,
    BadRow,
    Row,
    object_of,
    read_json_elements,
    read_json_rows,
    too_long,
)
from quietstar.errors import ConfigError, DataError

Kind = Literal["text", "json", "lines", "table", "parquet"]
KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "table",
    ".tsv": "table",
    ".parquet": "parquet",
}
"""Kind of a file by its ending: a text is one document; the others hold rows."""

PACKED = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0", ".zst": b"\x28\xb5\x2f\xfd"}
"""Endings of compressed files, and the bytes that these begin with."""

READ = f"{', '.join(KINDS)}, each also with {', '.join(PACKED)}"
"""The endings that are read, for messages."""

FOREIGN = {
    b"%PDF": "a PDF",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"SQLite format 3": "an SQLite database",
    b"\x7fELF": "a program",
    b"ARROW1": "an Arrow file",
    b"\x89HDF": "an HDF5 file",
    b"PAR1": "a parquet file",
    b"\xff\xfe\0\0": "text in UTF-32",
    b"\0\0\xfe\xff": "text in UTF-32",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
    **{mark: f"compressed ({ending})" for ending, mark in PACKED.items()},
}
"""What a file is that begins with these bytes and is not the text that its ending says."""

HEAD = 65_536
"""Bytes at the beginning of a file that are looked at to find its kind."""

LONG_LINE = 4096
"""Bytes without a line break after which a text that begins like a JSON object is one."""

MOST_TEXT = 1 << 30
"""Most bytes of a text file, which is in memory as a whole."""

ROWS_AT_ONCE = 256


def read_rows(
    file: BinaryIO, path: str, name: str, start: int, field: str | None, limit: int, option: str = TRAINING.field
) -> Iterator[Row]:
    """Yields the rows of a file from row `start` on; rows before it are not parsed.

    Args:
        file: File to read, open for reading bytes.
        path: Path of the file in messages.
        name: Name of the file, whose ending says its kind.
        start: First row to yield, counted from 0.
        field: Field or column that is wanted; of a parquet file only this one is read, with None all.
        limit: Most bytes of a row; longer rows come without content.
        option: Option that names the field, for messages.

    Raises:
        ConfigError: A library that the file needs is not installed.
        DataError: The file, rather than a row of it, is damaged or of another kind.
    """
    kind, packed = kind_of(name)
    if kind is None and not kind_ending(name):
        kind = "text"  # a name that says nothing; what the content says is checked below
    if kind is None:
        raise DataError(f"{path}: is of no known kind; needs a name that ends in {READ}")
    content = _unpacked(file, packed, path)
    head = _head(content)
    if not kind_ending(name) and _rows_in(head):
        kind = KINDS[".json"]  # which lines of JSON are too
    problem = _contradiction(head, kind)
    if problem and kind == "text":
        yield Row(path, 0, None, f"not UTF-8 text: {problem}", is_json=False, unit="")
    elif problem:
        raise DataError(f"{path}: {problem}")
    elif kind == "parquet":
        yield from read_parquet_rows(content, path, start, limit, field, option)
    else:
        yield from _parsed(content, head, path, kind, start, limit, kind_ending(name) == ".tsv")


def _parsed(content: BinaryIO, head: bytes, path: str, kind: Kind, start: int, limit: int, tabs: bool) -> Iterator[Row]:
    if kind == "text":
        if found := _rows_in(head):
            raise DataError(f"{path}: holds {found}, and is named as a text; {_rename(found)}")
        text = content.read(MOST_TEXT + 1)
        problem = f"longer than {MOST_TEXT} bytes; split it" if len(text) > MOST_TEXT else ""
        if (zero := text.find(b"\0")) >= 0:
            problem = f"not UTF-8 text: byte {zero} is zero; it is binary, or text in another encoding"
        if start == 0:
            yield Row(path, 0, None if problem else text, problem, is_json=False, unit="")
    elif kind == "table":
        if found := _rows_in(head):
            raise DataError(f"{path}: holds {found}, and is named as a table; {_rename(found)}")
        yield from read_table_rows(content, path, start, limit, tabs)
    elif (kind == "json" and _ARRAY.match(head)) or _ARRAY_OF_OBJECTS.match(head):
        yield from read_json_elements(content, path, start, limit)
    elif kind == "json":
        first = _first_line(content, limit)
        one = _goes_on(first, _head(content))
        content = cast(BinaryIO, io.BufferedReader(_Rejoined(first, content)))
        if not one:
            yield from read_json_rows(content, path, start, limit)
        elif start == 0:
            whole = content.read(limit + 1)
            problem = too_long(limit) if len(whole) > limit else ""
            yield Row(path, 0, None if problem else whole.removeprefix(BYTE_ORDER_MARK), problem, unit="")
    else:
        yield from read_json_rows(content, path, start, limit)


def _first_line(file: BinaryIO, limit: int) -> bytes:
    """Reads up to the end of the first line that is not blank, at most a little more than `limit` bytes."""
    begin = b""
    while not begin.strip() and len(begin) <= limit and (line := file.readline(limit + 2)):
        begin += line
    return begin


def _goes_on(first: bytes, rest: bytes) -> bool:
    """Returns whether a JSON value goes on after the first line of its file; otherwise each line is a value."""
    if not rest.strip() or _is_object(first):
        return False
    torn = rest.lstrip().startswith(b"{") and not first.rstrip().endswith((b"{", b"[", b",", b":"))
    return not torn


class _Rejoined(io.RawIOBase):
    """A file whose beginning has been read already."""

    def __init__(self, begin: bytes, rest: BinaryIO) -> None:
        self._parts: list[Any] = [io.BytesIO(begin), rest]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return next((size for part in self._parts if (size := part.readinto(buffer))), 0)


_ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[")
_ARRAY_OF_OBJECTS = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*\{")
_OBJECT = re.compile(rb'(\xef\xbb\xbf)?\s*\{\s*"[^"\n]*"\s*:')


def kind_ending(name: str) -> str:
    """Returns the ending of a name in lower case, without one of compression."""
    lower = PurePosixPath(name.lower())
    return (lower.with_suffix("") if lower.suffix in PACKED else lower).suffix


def kind_of(name: str) -> tuple[Kind | None, str]:
    """Returns the kind of a file by its name, None for an unknown one, and its ending of compression, if any."""
    last = PurePosixPath(name.lower()).suffix
    return KINDS.get(kind_ending(name)), last if last in PACKED else ""


def _unpacked(file: BinaryIO, ending: str, path: str) -> BinaryIO:
    """Returns the content of a file that is compressed by its first bytes, whatever its name."""
    head = _head(file)
    found = next((known for known, mark in PACKED.items() if head.startswith(mark)), "")
    if ending and not found and head:
        raise DataError(f"{path}: is not compressed as its ending {ending} says; it may be damaged, or misnamed")
    if not found:
        return file
    if found == ".zst":
        return cast(BinaryIO, io.BufferedReader(_zstandard(file, path)))
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return cast(BinaryIO, openers[found](file))


def _head(file: Any) -> bytes:
    """Returns bytes at the beginning of a file, at most `HEAD`; they are read again later."""
    if hasattr(file, "peek"):
        return bytes(file.peek(HEAD)[:HEAD])
    place = file.tell()
    head = bytes(file.read(HEAD))
    file.seek(place)
    return head


def _zstandard(file: BinaryIO, path: str) -> Any:
    try:
        arrow = importlib.import_module("pyarrow")
    except ImportError:
        raise ConfigError(
            f"{path}: .zst files need pyarrow, which is not installed; pip install 'quietstar[data]', "
            "or unpack the file"
        ) from None
    return arrow.CompressedInputStream(arrow.PythonFile(file, "r"), "zstd")


def _contradiction(head: bytes, kind: Kind) -> str:
    """Returns what is wrong with a file that begins with `head`; empty where it may be of this kind."""
    if kind == "parquet":
        return ""  # pyarrow says what is wrong
    found = next((name for mark, name in FOREIGN.items() if head.startswith(mark)), None)
    if found is None and head[257:262] == b"ustar":
        found = "a tar archive"
    if found is not None:
        return f"it is {found}; needs UTF-8 text"
    zero = head.find(b"\0")
    if kind != "lines" and zero >= 0:
        return f"byte {zero} is zero; it is binary, or text in another encoding"
    return ""


def _rows_in(head: bytes) -> str:
    """Returns what rows of JSON a text begins with; empty where it is no JSON."""
    if _ARRAY_OF_OBJECTS.match(head) and re.match(rb'[^{]*\{\s*("[^"\n]*"\s*:|\})', head):
        return "a JSON array of objects"
    if not _OBJECT.match(head):
        return ""
    lines = [line for line in head.split(b"\n")[:-1] if line.strip()]
    if all(map(_is_object, lines[:3])) and (lines or len(head) >= LONG_LINE):
        return "JSON objects, one per line"
    return "a JSON object" if _is_object(head) else ""


def _is_object(text: bytes) -> bool:
    try:
        return object_of(Row("", 0, text.removeprefix(BYTE_ORDER_MARK)), "") is not None
    except BadRow:
        return False


def _rename(found: str) -> str:
    return f"name it {'.jsonl' if 'line' in found else '.json'} to read its rows"


def read_table_rows(file: BinaryIO, source: str, start: int, limit: int, tabs: bool) -> Iterator[Row]:
    """Yields the rows of a CSV file with a header as JSON objects, from row `start` on, without blank ones.

    Args:
        file: CSV file in UTF-8, open for reading bytes.
        source: Name of the file in messages.
        start: First row to yield, counted from 0.
        limit: Most bytes of a row. A longer one becomes a row without content, and never is in memory as a whole.
        tabs: Whether fields are separated by tabs; otherwise by what the header has of comma, semicolon and tab.

    Raises:
        DataError: The header is missing or names a column twice, or the quotes of a row are wrong.
    """
    csv.field_size_limit(max(csv.field_size_limit(), limit))  # of the whole process, so it is no bound of one file
    lines = _RowLines(file, source, limit)
    text = iter(lines)
    header = next(text, "")
    comma = "\t" if tabs else next((mark for mark in ",;\t" if mark in header), ",")
    rows = csv.reader(chain([header], text), delimiter=comma, strict=True)
    begins = 1
    index = -1
    names: list[str] | None = None
    try:
        for cells in rows:
            begins, line = rows.line_num + 1, rows.line_num
            longer = lines.end_row()
            if not longer and len(cells) < 2 and not "".join(cells).strip():
                continue
            if names is None:
                if longer:
                    raise DataError(f"{source}:1: the header is {too_long(limit)}")
                names = _header(cells, source)
                continue
            index += 1
            if index < start:
                continue
            if longer:
                yield Row(source, index, None, too_long(limit), line=line)
            elif len(cells) != len(names):
                problem = f"has {len(cells)} cells, and the header {len(names)}"
                yield Row(source, index, None, problem, line=line)
            else:
                content = json.dumps(dict(zip(names, cells, strict=True)), ensure_ascii=False).encode()
                yield Row(source, index, content, line=line)
    except csv.Error as error:
        raise DataError(f"{source}:{begins}: not valid CSV: {error} in the row that begins here") from None


class _RowLines:
    """Lines of a CSV file, of which a row has at most `limit` bytes.

    Of a line that goes beyond, its quotes alone are left, so that the next row begins where it should.
    """

    def __init__(self, file: BinaryIO, source: str, limit: int) -> None:
        self._file, self._source, self._limit = file, source, limit
        self._left, self._longer = limit, False

    def end_row(self) -> bool:
        """Begins the next row; returns whether the last one was longer than the limit."""
        longer, self._longer, self._left = self._longer, False, self._limit
        return longer

    def __iter__(self) -> Iterator[str]:
        number = 0
        while line := self._file.readline(self._left + 2):  # with its line break
            number += 1
            size = len(line.rstrip(b"\r\n"))
            if size > self._left or (len(line) == self._left + 2 and not line.endswith(b"\n")):
                quotes = line.count(b'"')
                while line and not line.endswith(b"\n"):
                    line = self._file.readline(65_536)
                    quotes += line.count(b'"')
                self._left, self._longer = 0, True
                yield '"' if quotes % 2 else ""
                continue
            self._left -= size
            try:
                yield (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).decode("utf-8")
            except UnicodeDecodeError as error:
                found = f"{error.reason}, 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
                raise DataError(f"{self._source}:{number}: not UTF-8 text: {found}") from None


def _header(cells: list[str], source: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    for name, times in Counter(names).items():
        if times > 1:
            raise DataError(f"{source}:1: the header names the column {name!r} {times} times, needs each once")
    return names


def read_parquet_rows(
    file: BinaryIO, source: str, start: int, limit: int, field: str | None, option: str = TRAINING.field
) -> Iterator[Row]:
    """Yields the rows of a parquet file from row `start` on; row groups before it are not read.

    Args:
        file: Parquet file, open for reading bytes and seekable.
        source: Name of the file in messages.
        start: First row to yield, counted from 0.
        limit: Most bytes of a row's text; a longer row comes without content.
        field: Column that holds the text, or a field in it; None reads all columns as JSON objects.
        option: Option that names the field, for messages.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: The file is not a parquet file, or has no such column.
    """
    arrow, parquet = _pyarrow()
    try:
        table = parquet.ParquetFile(file)
    except arrow.ArrowInvalid as error:
        raise DataError(f"{source}: not a whole parquet file: {error}") from error
    column = None if field is None else _column_of(table.schema_arrow, source, field, arrow, option)
    is_text = column is not None and column == field and _is_text(table.schema_arrow.field(column).type, arrow)
    sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    first_rows = np.cumsum([0, *sizes])
    group = int(np.searchsorted(first_rows, start, side="right")) - 1
    if group == len(sizes):
        return
    index = int(first_rows[group])
    groups = range(group, len(sizes))
    columns = None if column is None else [column]
    for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=columns, use_threads=False):
        values = _bytes(batch.column(0), arrow) if is_text else _objects(batch)
        for text in values:
            if index >= start:
                yield _row(text, source, index, limit, column or "") if is_text else _object(text, source, index, limit)
            index += 1


def _objects(batch: Any) -> list[bytes | None]:
    return [json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "replace") for row in batch.to_pylist()]


def _object(content: bytes | None, source: str, index: int, limit: int) -> Row:
    if content is not None and len(content) > limit:
        return Row(source, index, None, too_long(limit))
    return Row(source, index, content)


def _row(text: bytes | None, source: str, index: int, limit: int, column: str) -> Row:
    if text is None:
        return Row(source, index, None, f"column {column!r} is null, needs a text", is_json=False)
    if len(text) > limit:
        return Row(source, index, None, too_long(limit), is_json=False)
    return Row(source, index, text, is_json=False)


def _bytes(values: Any, arrow: Any) -> list[bytes | None]:
    """Returns the texts as stored bytes: a row that is not UTF-8 must not spoil the others."""
    if arrow.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    found: list[bytes | None] = values.cast(arrow.large_binary()).to_pylist()
    return found


def _column_of(schema: Any, source: str, field: str, arrow: Any, option: str) -> str:
    """Returns the column of a field: the longest name that the field is, or begins with before a dot."""
    end = len(field)
    while end >= 0:
        if field[:end] in schema.names:
            kind = schema.field(field[:end]).type
            inside = arrow.types.is_nested(kind) and not arrow.types.is_list(kind)
            chat = arrow.types.is_list(kind) and arrow.types.is_struct(kind.value_type)
            if not (inside or chat or (end == len(field) and _is_text(kind, arrow))):
                raise DataError(f"{source}: column {field[:end]!r} holds {kind}, needs string")
            return field[:end]
        end = field.rfind(".", 0, end)
    columns = ", ".join(map(repr, schema.names[:10]))
    raise DataError(f"{source}: has no column {field!r} (its columns: {columns}); {option} names the one to read")


def _is_text(kind: Any, arrow: Any) -> bool:
    text = kind.value_type if arrow.types.is_dictionary(kind) else kind
    return bool(arrow.types.is_string(text) or arrow.types.is_large_string(text) or arrow.types.is_string_view(text))


def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(
            "data.source: parquet shards need pyarrow, which is not installed; pip install 'quietstar[data]'"
        ) from error
