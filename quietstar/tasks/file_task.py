"""What tasks have in common whose problems are read from files.

Files of problems: which they are, and their records one by one, each with its place for messages.

Where the problems of known tasks are published: read from there when no file of them is given.

Solved examples that stand before each prompt: the user's own, or those that STaR has published.

Rationales that speak of the hint they were given, and so make no sense without it.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from quietstar.config.loops import ProblemOptions
from quietstar.data.shards import find_shards
from quietstar.errors import ConfigError, DataError, QuietStarError
from quietstar.tasks.task import Problem, Split, Task


class FileTask(Task):
    """A task whose problems are the records of files, each read once, when it is first asked for.

    Args:
        options: Where the files are.

    Attributes:
        train_files: What the files of the training problems are called in a directory, as patterns.
        test_files: The same of the held-out problems.
        home: Where they are published.
        published_examples: Name of its solved examples in the folder `few_shot`.
        left_out: Problems of each split read so far that the task cannot use, by intention.
    """

    train_files: ClassVar[tuple[str, ...]]
    test_files: ClassVar[tuple[str, ...]]
    home: ClassVar[PublicHome | None] = None
    published_examples: ClassVar[str | None] = None

    def __init__(self, options: ProblemOptions) -> None:
        self.options = options
        self.left_out: dict[Split, int] = {}
        self._problems: dict[Split, list[Problem]] = {}

    @abstractmethod
    def read(self, record: Record, number: int) -> Problem | None:
        """The problem of a record; None where the task leaves it out.

        Args:
            record: What the file has.
            number: From 1, among the problems of the split; an id where there is no other.

        Raises:
            DataError: The record has not what a problem needs.
        """

    def problems(self, split: Split) -> Sequence[Problem]:
        if split not in self._problems:
            read = [self.read(record, number) for number, record in enumerate(self._records(split), start=1)]
            kept = [problem for problem in read if problem is not None]
            _check_ids(kept)
            if not kept:
                raise DataError(f"{self.name}: there are no {split} problems, {len(read)} were left out; needs one")
            self.left_out[split] = len(read) - len(kept)
            self._problems[split] = kept
        return self._problems[split]

    def _records(self, split: Split) -> Iterable[Record]:
        files = find_files(self.options, split, self.train_files if split == "train" else self.test_files)
        if files:
            return (record for file in files for record in read_records(file))
        if self.home is None:
            raise ConfigError(f"problems.path: missing; the task {self.name} needs a file or directory of problems")
        return self.home.records(split)

    def few_shot(self, hint: bool = False) -> str:
        return solved_examples(self.options, hint, self.published_examples)


def _check_ids(problems: Sequence[Problem]) -> None:
    first: dict[str, str] = {}
    for problem in problems:
        if problem.id in first:
            known = f"{problem.place}: the id {problem.id!r} is that of {first[problem.id]} already"
            raise DataError(f"{known}; each problem needs its own")
        first[problem.id] = problem.place


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


@dataclass(frozen=True)
class PublicHome:
    """A dataset of the Hugging Face hub, and where else its files can be had.

    Args:
        dataset: `owner/name`.
        train: Pattern of the parquet files with training problems.
        test: Pattern of those with held-out problems.
        download: Web page from which the task's own files can be downloaded.
        files: What they are called, for messages.
    """

    dataset: str
    train: str
    test: str
    download: str
    files: str

    def records(self, split: Split) -> Iterator[Record]:
        """The rows of a split, in the order of the files.

        Raises:
            ConfigError: pyarrow is not installed, or the hub cannot be reached.
        """
        # only here: processes that check answers read no problems, and this import takes seconds
        try:
            parquet: Any = import_module("pyarrow.parquet")
        except ImportError:
            raise ConfigError(f"problems.path: missing, and {self._needs('pyarrow is not installed')}") from None
        try:
            for shard in find_shards(self.dataset, self.train if split == "train" else self.test):
                with shard.open() as file:
                    rows = parquet.read_table(file).to_pylist()
                for number, row in enumerate(rows, start=1):
                    yield Record(f"{shard.path}:{number}", {name: _as_text(value) for name, value in row.items()})
        except QuietStarError as error:
            raise ConfigError(f"problems.path: missing, and {self._needs(str(error))}") from error
        except OSError as error:  # of huggingface_hub's network client
            raise ConfigError(f"problems.path: missing, and {self._needs(f'reading failed: {error}')}") from error

    def _needs(self, reason: str) -> str:
        return (
            f"the hub dataset {self.dataset} cannot be read ({reason}). Install 'quietstar[data]' and go online, or "
            f"download {self.files} from {self.download} and give their directory"
        )


def _as_text(value: Any) -> Any:
    return NumberText(value) if type(value) in (int, float) else value


PUBLISHED = Path(__file__).with_name("few_shot")


def solved_examples(options: ProblemOptions, hint: bool, published: str | None = None) -> str:
    """The solved examples of a task as they are, ending in a blank line; empty where there are none.

    Args:
        options: Of it, `few_shot_path` and `few_shot_hint_path`.
        hint: Those with the hint shown.
        published: Name of the shipped ones, which the task has where the option is null.

    Raises:
        ConfigError: The task has none of its own, and the options name only the others: with and without the hint,
            prompts need the same examples.
        DataError: There is no such file, or no text in it.
    """
    key, other = ("few_shot_hint_path", "few_shot_path") if hint else ("few_shot_path", "few_shot_hint_path")
    path: str | None = getattr(options, key)
    if path is not None:
        return _read(path, f"problems.{key}")
    if published is not None:
        return _read(str(PUBLISHED / f"{published}{'_hinted' if hint else ''}.txt"), f"problems.{key}")
    if getattr(options, other) is not None:
        shown = "the hint shown" if hint else "no hint"
        raise ConfigError(f"problems.{key}: missing, but problems.{other} is given; needs the same with {shown}")
    return ""


@cache
def _read(path: str, key: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(f"{key}: {path}: cannot be read: {reason}") from error
    if not text.strip():
        raise DataError(f"{key}: {path}: has no text in it, needs solved examples")
    return text.rstrip("\n") + "\n\n"


_TELLS = re.compile(
    r"""\(correct\)
    | \bthe\ hint\b | \bhinted\b | \bas\ hinted | \bhint\ (?:says|tells|shows)
    | \bgiven\ (?:that\ )?the\ (?:correct\ |right\ |final\ )?answer
    | \b(?:since|because|as|knowing)\ (?:that\ )?the\ (?:correct\ |right\ |final\ )?answer\ (?:is|was|must\ be)
    | \bthe\ (?:correct\ |right\ |final\ )?answer\ (?:is|was)\ (?:already\ )?(?:given|provided|marked|shown|known)
    | \b(?:marked|labell?ed|indicated|shown)\ as\ (?:the\ )?(?:correct|right)
    | \bwe\ (?:already\ )?(?:know|are\ told|were\ told)\ (?:that\ )?the\ (?:correct\ |right\ |final\ )?answer
    | \bthe\ (?:answer|number|value)\ in\ (?:the\ )?(?:parentheses|brackets)""",
    re.IGNORECASE | re.VERBOSE,
)


def speaks_of_hint(completion: str) -> bool:
    """Whether a rationale mentions a hint or an answer that is already known."""
    return _TELLS.search(" ".join(completion.split())) is not None


def begins_with_hint(completion: str, answer: str) -> bool:
    """Whether a rationale repeats `(answer)`, as it stands in the question, on its first line."""
    first = completion.strip().partition("\n")[0]
    return f"({answer})" in first
