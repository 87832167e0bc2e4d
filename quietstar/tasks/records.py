"""Files of problems: which they are, and their records one by one, each with its place for messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quietstar.errors import DataError

if TYPE_CHECKING:
    from quietstar.tasks.options import ProblemOptions
    from quietstar.tasks.task import Split


class NumberText(str):
    """A JSON number as it was written: as a float, 0.1 would be another one."""


@dataclass(frozen=True)
class Record:
    """One JSON object of a file.

    Args:
        place: `file:line`.
        fields: By name. Numbers are `NumberText`.
    """

    place: str
    fields: dict[str, Any]

    def text(self, name: str, *, option: str = "", number: bool = False) -> str:
        """A field that must hold text.

        Args:
            name: The field.
            option: Dotted key of the option that says which field it is.
            number: A JSON number will do.

        Raises:
            DataError: It is missing, empty, or of another type.
        """
        if name not in self.fields:
            names = ", ".join(map(repr, list(self.fields)[:10])) or "none"
            told = f"; {option} names the one to read" if option else ""
            raise DataError(f"{self.place}: has no field {name!r} (its fields: {names}){told}")
        value = self.fields[name]
        if not isinstance(value, str) or (isinstance(value, NumberText) and not number):
            raise DataError(f"{self.place}: field {name!r} is a JSON {_kind(value)}, needs a string")
        if not value.strip():
            raise DataError(f"{self.place}: field {name!r} has no text in it")
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise DataError(f"{self.place}: field {name!r} has half a surrogate pair in it, which is no character")
        return str(value)


def find_files(options: ProblemOptions, split: Split, names: Sequence[str]) -> list[Path]:
    """The files of a split in the order of their names.

    Args:
        options: Where they are. A `path` that is a file holds the training problems.
        split: Which ones.
        names: What they are called in a directory, as patterns; the first that matches any file counts.

    Returns:
        None at all where `path` is null: the problems have to come from their public home.

    Raises:
        DataError: There is no such file or directory, or none of these files in it.
    """
    given = options.test_path if split == "test" else None
    key = "problems.path" if given is None else "problems.test_path"
    given = given or options.path
    if given is None:
        return []
    place = Path(given)
    if place.is_file():
        if split == "train" or key == "problems.test_path":
            return [place]
        place = place.parent
    if not place.is_dir():
        raise DataError(f"{key}: {given}: no such file or directory")
    for name in names:
        if found := sorted(file for file in place.glob(name) if file.is_file()):
            return found
    told = "; problems.test_path names another file" if split == "test" else ""
    raise DataError(f"{key}: {place} has no {split} problems: needs {' or '.join(names)}{told}")


def read_records(file: Path) -> Iterator[Record]:
    """The objects of a JSONL file, blank lines left out, or the one object of a `.json` file.

    Raises:
        DataError: The file cannot be read, or a line of it holds something else; with `file:line`.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    content = content.removeprefix(b"\xef\xbb\xbf")
    lines = [content] if file.suffix == ".json" else content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _record(line, f"{file}:{number}")


def _record(line: bytes, place: str) -> Record:
    try:
        fields = json.loads(line.decode("utf-8"), parse_float=NumberText, parse_int=NumberText)
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text: {error.reason} at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        reason = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise DataError(f"{place}: not valid JSON: {reason}; needs one object a line") from None
    except RecursionError:
        raise DataError(f"{place}: not usable JSON: nested too deeply") from None
    if not isinstance(fields, dict):
        raise DataError(f"{place}: holds a JSON {_kind(fields)}, needs an object with the fields of a problem")
    return Record(place, fields)


def _kind(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", NumberText: "number", bool: "boolean", float: "number"}
    return names.get(type(value), "null")
