"""Tasks with problems that are read from files.

`FileTask` is the base class; it reads either files (`find_files`, `read_records`) or, where none are given, the dataset
of the Hugging Face hub that publishes the problems (`PublicHome`). `solved_examples` are the examples before each
prompt. `speaks_of_hint` and `begins_with_hint` find rationales that mention their hint; `clean`, `plain_latex`,
`first_after_marker`, `last_box` and `through_box` are for whoever looks for the answer of a completion.
"""

from __future__ import annotations

import re
import unicodedata
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from quietstar.config.loops import ProblemOptions
from quietstar.config.options import check_input, path_kind
from quietstar.data.kinds import kind_of
from quietstar.data.rows import json_type
from quietstar.data.shards import find_shards, read_objects
from quietstar.errors import ConfigError, DataError, QuietStarError
from quietstar.tasks.task import Problem, Split, Task

PUBLISHED = Path(__file__).with_name("few_shot")


class FileTask(Task):
    """A task whose problems are the records of files. Each file is read once, when it is first asked for.

    Args:
        options: Options of the problems, with the paths of the files.

    Attributes:
        train_files: Glob patterns of the files with training problems in a directory.
        test_files: Glob patterns of the files with held-out problems in a directory.
        home: Published dataset that is read where no file is given.
        published_examples: Name of the task's solved examples in the folder `few_shot`.
        left_out: Number of problems that the task left out by intention, for each split read so far.
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
        """Returns the problem of a record; None where the task leaves it out.

        Args:
            record: Record of the file.
            number: Position among the problems of the split, from 1; the id of a problem that has no other.

        Raises:
            DataError: The record lacks a field of a problem, or has one that cannot be read.
        """

    def problems(self, split: Split) -> Sequence[Problem]:
        if split not in self._problems:
            read = [self.read(record, number) for number, record in enumerate(self._records(split), start=1)]
            kept = [problem for problem in read if problem is not None]
            _check_ids(kept)
            if not kept:
                raise DataError(f"{self.name}: has no {split} problems, {len(read)} were left out; needs at least one")
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
    """A JSON number as it was written: as a float, 0.1 would be a different number."""


@dataclass(frozen=True)
class Record:
    """One JSON object of a file.

    Args:
        place: `file:line` of the object, for messages.
        fields: Values by the name of the field; numbers are `NumberText`.
    """

    place: str
    fields: dict[str, Any]

    def text(self, name: str, *, option: str = "", number: bool = False) -> str:
        """Returns the text of a field that must hold text.

        Args:
            name: Name of the field.
            option: Dotted key of the option that names the field, for messages.
            number: Whether a JSON number is accepted too.

        Raises:
            DataError: The field is missing, empty, or of another type.
        """
        if name not in self.fields:
            names = ", ".join(map(repr, list(self.fields)[:10])) or "none"
            told = f"; {option} names the one to read" if option else ""
            raise DataError(f"{self.place}: has no field {name!r} (its fields: {names}){told}")
        value = self.fields[name]
        if not isinstance(value, str) or (isinstance(value, NumberText) and not number):
            raise DataError(f"{self.place}: field {name!r} is a JSON {json_type(value)}, needs a string")
        if not value.strip():
            raise DataError(f"{self.place}: field {name!r} has no text in it")
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise DataError(f"{self.place}: field {name!r} contains half a surrogate pair, which is not a character")
        return str(value)


def find_files(options: ProblemOptions, split: Split, names: Sequence[str]) -> list[Path]:
    """Returns the files of a split in the order of their names.

    Args:
        options: Options of the problems, with the paths. A `path` that is a file holds the training problems.
        split: Split to find the files of.
        names: Glob patterns of the files in a directory; the first pattern that matches a file is used.

    Returns:
        The files; an empty list where `path` is null: then the problems come from the public dataset.

    Raises:
        DataError: There is no such file or directory, or the directory has none of these files.
    """
    given = options.test_path if split == "test" else None
    key = "problems.path" if given is None else "problems.test_path"
    given = given or options.path
    if given is None:
        return []
    place = Path(given)
    kind = path_kind(place, key)
    if kind == "file":
        if split == "train" or key == "problems.test_path":
            return [place]
        place = place.parent
    elif kind != "directory":
        raise DataError(f"{key}: {given}: no such file or directory")
    for name in names:
        if found := _matching(place, name, key):
            return found
    told = "; problems.test_path names another file" if split == "test" else ""
    raise DataError(f"{key}: {place} has no {split} problems: needs {' or '.join(names)}{told}")


def _matching(directory: Path, name: str, key: str) -> list[Path]:
    """Returns the files of a pattern; a plain name stands for files of its stem of each kind with rows."""
    if found := sorted(file for file in directory.glob(name) if file.is_file()):
        return found
    stem = name.removesuffix(".jsonl")
    found = sorted(
        file
        for file in directory.iterdir()
        if file.is_file()
        and file.name.partition(".")[0].lower() == stem
        and kind_of(file.name)[0] not in (None, "text")
    )
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise DataError(f"{key}: {directory} has {names}; name the one to read")
    return found


def read_records(file: Path) -> Iterator[Record]:
    """Yields the rows of a file of any kind with rows, without blank lines.

    Raises:
        DataError: The file cannot be read, or a row of it is not an object; the message has `file:line`.
    """
    for place, fields in read_objects(file, "with the fields of a problem", number=NumberText):
        yield Record(place, fields)


@dataclass(frozen=True)
class PublicHome:
    """A dataset of the Hugging Face hub, and the web page that also has its files.

    Args:
        dataset: Name of the dataset on the hub, `owner/name`.
        train: Glob pattern of the parquet files with training problems.
        test: Glob pattern of the parquet files with held-out problems.
        download: Address of the web page from which the task's own files can be downloaded.
        files: Names of the task's own files, for messages.
    """

    dataset: str
    train: str
    test: str
    download: str
    files: str

    def records(self, split: Split) -> Iterator[Record]:
        """Yields the rows of a split, in the order of the files.

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
        except OSError as error:  # raised by huggingface_hub's network client
            raise ConfigError(f"problems.path: missing, and {self._needs(f'reading failed: {error}')}") from error

    def _needs(self, reason: str) -> str:
        return (
            f"the hub dataset {self.dataset} cannot be read ({reason}). Install 'quietstar[data]' and go online, or "
            f"download {self.files} from {self.download} and give their directory"
        )


def _as_text(value: Any) -> Any:
    return NumberText(value) if type(value) in (int, float) else value


def solved_examples(options: ProblemOptions, hint: bool, published: str | None = None) -> str:
    """Returns the solved examples of a task unchanged, ending in a blank line; empty where there are none.

    Args:
        options: Options of the problems; `few_shot_path` and `few_shot_hint_path` are used.
        hint: Whether to return the examples that show the hint.
        published: Name of the shipped examples, which the task uses where the option is null.

    Raises:
        ConfigError: The task ships none, and the options name only the other file: with and without the hint, prompts
            need the same examples.
        DataError: There is no such file, or it has no text.
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
    check_input(path, key)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
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
    """Returns whether a rationale mentions a hint or an answer that is already known."""
    return _TELLS.search(" ".join(completion.split())) is not None


def begins_with_hint(completion: str, answer: str) -> bool:
    """Returns whether a rationale repeats `(answer)`, as the question shows it, on its first line."""
    first = completion.strip().partition("\n")[0]
    return f"({answer})" in first


def first_after_marker(text: str, marker: str = "####") -> str | None:
    """Returns the text after the first `marker`, up to the end of its line.

    Returns:
        The text without white space around it; None where there is no marker, or nothing after it on its line.
    """
    _, found, after = text.partition(marker)
    line = after.partition("\n")[0].strip()
    return line if found and line else None


_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*+(?=\{|[\d.+-])|\s++)")
_BRACE = re.compile(r"\\.|[{}]")
_UNBRACED = re.compile(r"[^\s$]*[^\s$.]")
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_CLOSERS = re.compile(r"[^\n]*(?:\n[ \t]*(?:\\\]|\$\$|\\end\{[^{}\n]*\})[^\n]*)*")


def last_box(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{...}`, with braces nested to any depth, or of `\boxed 5` without braces.

    Returns:
        The content; None where there is no box, or it is not closed.
    """
    place = next(iter(reversed(_boxes(text))), None)
    return None if place is None else text[slice(*place)].strip()


def through_box(text: str) -> str:
    r"""Returns a text up to the line of the last complete box in the first paragraph that has one; all of it without a
    box.

    That box is the answer, whatever other problems the text solves afterwards. A line that closes the formula around
    the box, such as `\]`, is kept.
    """
    places = [place for place in _boxes(text) if place is not None]
    if not places:
        return text
    blank = _BLANK_LINE.search(text, places[0][1])
    end = max(stop for start, stop in places if blank is None or start < blank.start())
    closers = _CLOSERS.match(text, end)
    return text if closers is None else text[: closers.end()]


def _boxes(text: str) -> list[tuple[int, int] | None]:
    """Returns where the content of each box begins and ends; None for one that has none, or is not closed."""
    closed: dict[int, int] = {}
    open_braces: list[int] = []
    boxes = list(_BOX.finditer(text))
    for brace in _BRACE.finditer(text) if boxes else ():
        if brace[0] == "{":
            open_braces.append(brace.start())
        elif brace[0] == "}" and open_braces:
            closed[open_braces.pop()] = brace.start()
    places: list[tuple[int, int] | None] = []
    for box in boxes:
        start = box.end()
        if text.startswith("{", start):
            places.append((start + 1, closed[start]) if start in closed else None)
        else:
            content = _UNBRACED.match(text, start)
            places.append(content.span() if content else None)
    return places


THIN = "\u202f"
"""Narrow space, which every fixed space becomes: it may stand between thousands."""
_SAME = {
    **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full width
    **dict.fromkeys(map(ord, "\u2212\u2013\u2010\u2011\ufe63\uff0d"), "-"),
    **dict.fromkeys(map(ord, "\u2044\u2215"), "/"),
    **dict.fromkeys(map(ord, "\u066a\ufe6a"), "%"),
    **dict.fromkeys(map(ord, "\ufe0e\ufe0f"), ""),
    ord("\u066b"): ".",
    ord("\u066c"): ",",
    ord("\u3000"): " ",
    ord("\u3002"): ".",
}
_INVISIBLE_OPERATORS = "\u2061\u2062\u2063\u2064"  # they stand for products and sums
END_OF_TEXT = re.compile(
    r"</s>|<[|\uff5c](?=[^>]{0,40}(?:end|eos|eot|im_))[^<>|\uff5c\s]{1,40}[|\uff5c]>|<(?:eos|bos|pad|(?:start|end)_of_(?:turn|text))>"
    r"|\[(?:/?INST|EOS|PAD|SEP)\]|(?<!\d)<(?:s|[|\uff5c][^<>|\uff5c\s]{1,40}[|\uff5c])>"
    r"|<(?:s|[|\uff5c][^<>|\uff5c\s]{1,40}[|\uff5c])>(?!\d)",  # `7<s>2` is no number
    re.IGNORECASE,
)
_STRUCK_OUT = re.compile(r"<(s|del|strike)>([^<]*)</\1>", re.IGNORECASE)
_VULGAR = re.compile(r"[\u00bc-\u00be\u2150-\u215e\u2189](?!\d)")


def clean(text: str) -> str:
    """Returns a text up to its end-of-text token, with one character for each of its kind and without invisible ones.

    Digits of all scripts, letters of full width, minus signs, slashes and spaces become those of ASCII, or `THIN`.
    """
    text = _STRUCK_OUT.sub(r"~~\2~~", re.sub(r"\x1b\[[\d;]{0,20}m", "", text))
    ends = (match.start() for match in END_OF_TEXT.finditer(text) if text[: match.start()].strip())
    text = END_OF_TEXT.sub("", text[: next(ends, len(text))])
    if not text.isascii():
        text = "".join(map(_same, text))
        text = _VULGAR.sub(lambda match: f" {unicodedata.normalize('NFKC', match[0])}".replace("\u2044", "/"), text)
    return text


def _same(character: str) -> str:
    if character.isascii():
        return character
    code = ord(character)
    if code in _SAME:
        return _SAME[code]
    kind = unicodedata.category(character)
    if kind == "Nd":
        return str(unicodedata.decimal(character))
    if kind == "Zs":
        return THIN
    return "" if kind == "Cf" and character not in _INVISIBLE_OPERATORS else character


TAGS = re.compile(r"</?(?:b|strong|i|em|u|code|mark|answer|span|p)>|<br ?/?>", re.IGNORECASE)
_EMPHASIS = re.compile(r"(?<![\w*`)])(\*{1,3}|_{1,3}|`{1,3})(?![\s*_`])([^*_`]*[^\s*_`])\1(?![\w*`(])")
_DOLLARS = re.compile(r"(?<![\d.\\$])(\$\$?)((?:[^$\\]++|\\.)++)(?<!\s)\1(?![\d$])")
_WRAPPER = re.compile(
    r"\\(?:boxed|fbox|emph|underline|boldsymbol|bm|math(?:bf|rm|sf|it|tt)|text(?:bf|it|sf|tt|up))\s*"
    r"\{((?:[^{}]++|\{(?:[^{}]++|\{[^{}]*+\})*+\})*+)\}"
)
_BRACKETS = (
    *(("(", ")", ","), ("[", "]", ","), ("{", "}", ",")),  # with a comma it may be a pair
    *(('"', '"', ""), ("'", "'", ""), ("\u201c", "\u201d", ""), ("\u2018", "\u2019", ""), ("\u00ab", "\u00bb", "")),
)
_FRACTION = re.compile(r"\\[cdt]?frac\s*(?:\{\s*([-+\d.,]+)\s*\}|(\d))\s*(?:\{\s*([\d.,]+)\s*\}|(\d))")


def without_markup(text: str) -> str:
    """Returns a text without the innermost emphasis, dollars and commands of LaTeX that only set it."""
    return _EMPHASIS.sub(r"\2", _DOLLARS.sub(r"\2", _WRAPPER.sub(r" \1 ", text)))


def without_brackets(text: str) -> str:
    """Returns a text without the brackets or quotes around all of it."""
    for opening, closing, kept in _BRACKETS:
        inner = text[1:-1]
        if opening != closing and inner.startswith(opening) and inner.endswith(closing):  # `((5))`
            layers = min(len(inner) - len(inner.lstrip(opening)), len(inner) - len(inner.rstrip(closing)))
            inner = inner[layers : len(inner) - layers]
        if text.startswith(opening) and text.endswith(closing) and not set(inner) & set(opening + closing + kept):
            text = inner
    return text


def slashed(text: str) -> str:
    r"""Returns a text with `1/2` for `\frac{1}{2}`."""
    return _FRACTION.sub(lambda match: f" {match[1] or match[2]}/{match[3] or match[4]} ", text)


def plain_latex(text: str) -> str:
    """Returns a text without the LaTeX that does not change its meaning."""
    text = text.replace("{,}", ",").replace("{}", " ")
    text = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\!", "", text)
    text = re.sub(r"\^\{?\\circ\}?|\\(?:circ|degree)(?![A-Za-z])", "\u00b0", text)
    text = re.sub(r"\\[,;: ]|~", THIN, text)
    return re.sub(r"\\([%$])", r"\1", text).strip(" " + THIN)
