"""Documents from text and JSONL files. Everything that is wrong with a file is reported with its name and line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quietstar.errors import DataError


@dataclass(frozen=True)
class Document:
    """One text.

    Args:
        text: The text; line breaks are `\\n` whatever they were in the file.
        source: The file it comes from.
        line: Its line in a JSONL file, from 1; None for a text file, which is one document as a whole.
    """

    text: str
    source: str
    line: int | None = None


def read_documents(path: str | os.PathLike[str], field: str = "text") -> Iterator[Document]:
    """Reads the documents of a file, or of the `.txt` and `.jsonl` files of a directory in the order of their names.

    A `.jsonl` file holds one document per line; any other file is one document.

    Args:
        path: The file or directory. Directories inside it are not read.
        field: The field of a JSONL line that holds the text.

    Raises:
        DataError: for a path that cannot be read, a file or a document without text, bytes that are not UTF-8, a line
            that is not a JSON object, and a field that is missing or no text. It names file, line and reason.
    """
    place = Path(path)
    if place.is_dir():
        files = sorted(entry for entry in place.iterdir() if entry.suffix in (".txt", ".jsonl") and entry.is_file())
        if not files:
            raise DataError(f"{place}: the directory has no .txt or .jsonl file")
    elif place.exists():
        files = [place]
    else:
        raise DataError(f"{place}: no such file or directory")
    for file in files:
        if file.suffix == ".jsonl":
            yield from _read_jsonl(file, field)
        else:
            yield _read_text(file)


def _read_text(file: Path) -> Document:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    text = _decode(content, file)
    if not text or text.isspace():
        raise DataError(f"{file}: no text in it ({len(content)} bytes, all white space)")
    return Document(text, str(file))


def _read_jsonl(file: Path, field: str) -> Iterator[Document]:
    found = False
    offset = 0
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    found = True
                    text = _field_of(_decode(line, file, number, offset), field, f"{file}:{number}")
                    yield Document(text, str(file), number)
                offset += len(line)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    if not found:
        raise DataError(f"{file}: no text in it ({offset} bytes, all white space)")


def _field_of(line: str, field: str, place: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"{place}: not usable JSON: nested too deeply") from error
    if not isinstance(record, dict):
        raise DataError(f"{place}: holds a JSON {_json_type(record)}, needs an object with the field {field!r}")
    if field not in record:
        fields = ", ".join(repr(name) for name in list(record)[:10]) or "none"
        raise DataError(f"{place}: has no field {field!r} (its fields: {fields}); data.field names the one to read")
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{place}: field {field!r} is a JSON {_json_type(text)}, needs a string")
    if not text or text.isspace():
        raise DataError(f"{place}: field {field!r} has no text in it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair, which is no character
        raise DataError(f"{place}: field {field!r} is not valid Unicode at character {error.start}") from error
    return _normalise_line_breaks(text)


def _decode(content: bytes, file: Path, line: int = 1, offset: int = 0) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        byte = content[error.start]
        raise DataError(
            f"{file}:{line}: not UTF-8 text: {error.reason}, byte 0x{byte:02x} at offset {offset + error.start}"
        ) from error
    return _normalise_line_breaks(text.removeprefix("\ufeff") if offset == 0 else text)


def _normalise_line_breaks(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
