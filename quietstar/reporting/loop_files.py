"""The files of a run of STaR or V-STaR, and their numbers as cells of tables.

The first half reads the summary, the options and a few completions of the last iteration. The second half makes cells
for the terminal and the page: of iterations, then of ways to choose one of several candidates.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from quietstar.config.parsing import MAX_JSON_BYTES, check_type, open_file, parse_json, read_json_file, read_lines
from quietstar.errors import DataError
from quietstar.reporting.charts import MOST_LINES
from quietstar.reporting.scales import MINUS
from quietstar.runs.directory import RunDirectory, read_run
from quietstar.runs.files import KEPT, STORE, SUMMARY
from quietstar.statistics.candidate_table import CandidateTable
from quietstar.statistics.iterations import Distinct
from quietstar.statistics.ranking import Calibration, StepCounts

OF_A_KIND = 3
RIGHT, RIGHT_BUT, WRONG, HINTED, HINTED_BUT = (
    "right",
    "right answer, but a wrong step inside",
    "wrong",
    "rationalised: right with the answer as a hint",
    "rationalised: right answer, but a wrong step inside",
)
_SECONDS = re.compile(r"([0-9]{1,12}(?:\.[0-9]{0,12})?) s")
Row = Mapping[str, Any]
Way = tuple[str, str | None]
"""Way to choose one of several candidates: a measure, and the score that it uses (None without one)."""
MAJORITY: Way = ("maj", None)
PASS: Way = ("pass", None)
_ABSENT: Any = None
"""Default of what a summary may lack: where it is there it has the type of its field."""


@dataclass(frozen=True)
class _Judged:
    accuracy: float
    problems: int
    samples: int
    solved: int
    by_group: dict[str, float]
    truncated: float = 0.0
    unanswered: float = 0.0
    tokens: float = 0.0
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class _Built:
    kept: int
    hinted: int
    right_inside_sample: float | None = None
    right_inside_rationalize: float | None = None


@dataclass(frozen=True)
class _Trained:
    steps: int


@dataclass(frozen=True)
class _Iteration:
    iteration: int
    sampled: _Judged = _ABSENT
    rationalized: _Judged = _ABSENT
    held_out: _Judged = _ABSENT
    built: _Built = _ABSENT
    trained: _Trained = _ABSENT
    distinct: Distinct | None = None
    step_counts: StepCounts | None = None
    newly_solved: int = 0
    lost: int = 0
    ever: int = 0


@dataclass(frozen=True)
class _Candidates(CandidateTable):
    compared: str | None
    calibration: dict[str, Calibration] = _ABSENT


@dataclass(frozen=True)
class _Summary:
    """What the pages use of `summary.json`."""

    iterations: list[_Iteration]
    task: str | None = None
    candidates: _Candidates | None = None
    warnings: list[str] = _ABSENT


@dataclass(frozen=True)
class _SampleLine:  # of the store, as far as a page uses it
    kind: Literal["sample"]
    purpose: str
    problem: str
    index: int
    text: str
    tokens: int
    finish_reason: str


@dataclass(frozen=True)
class _VerdictLine:
    kind: Literal["verdict"]
    purpose: str
    problem: str
    index: int
    answer: str | None
    correct: bool
    failure: str | None


@dataclass(frozen=True)
class _KeptLine:
    iteration: int
    source: str
    problem: str
    index: int
    prompt: str
    right_inside: bool | None


@dataclass(frozen=True)
class Reading:
    """A completion to read.

    Args:
        kind: Kind of completion: `RIGHT`, `RIGHT_BUT`, `WRONG`, `HINTED` or `HINTED_BUT`.
        problem: Id of the problem that the completion was written for.
        prompt: Prompt of the completion without solved examples and hint; None if unknown.
        text: Text of the completion.
        answer: Answer that was found in the completion; None if there is none.
        tokens: Number of tokens in the completion.
        truncated: Whether the completion reached the limit of tokens.
        failure: Reason why the check of the completion did not finish; None if it did.
    """

    kind: str
    problem: str
    prompt: str | None
    text: str
    answer: str | None
    tokens: int
    truncated: bool
    failure: str | None


@dataclass(frozen=True)
class LoopRun:
    """A run's files as plain values.

    Args:
        files: Name, options, events and environment.
        summary: Content of `summary.json`.
        readings: A few completions of the last iteration that sampled, ordered by kind.
    """

    files: RunDirectory
    summary: dict[str, Any]
    readings: Sequence[Reading] = ()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Entries of the summary's iterations, in order."""
        rows: list[dict[str, Any]] = self.summary["iterations"]
        return rows

    @property
    def candidates(self) -> dict[str, Any] | None:
        """Measures of several candidates per held-out problem; None if there are none."""
        return self.summary.get("candidates")

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each kind of phase over all iterations, by name, as far as the events tell."""
        found: dict[str, float] = {}
        for event in self.files.events:
            name, _, what = str(event["event"]).rpartition(" ")
            match = _SECONDS.fullmatch(str(event.get("message")))
            if name and what == "finished" and match:
                found[name] = found.get(name, 0.0) + float(match[1])
        return found


def read_summary(directory: Path) -> dict[str, Any]:
    """Returns the content of a run's `summary.json`.

    Raises:
        DataError: The file is missing, cannot be read, or is not a summary; the message names the field.
    """
    file = directory / SUMMARY
    try:
        summary: dict[str, Any] = read_json_file(file)
        if not isinstance(summary, dict) or not summary.get("iterations"):
            raise DataError(f"it has no list of iterations; needs the {SUMMARY} of a run of STaR or V-STaR")
        check_type(summary, _Summary, "")
    except FileNotFoundError:
        raise DataError(
            f"{directory}: has no {SUMMARY}, which a run writes when its iterations are done; run its command again"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: cannot be read ({error}); run the command of this run again, which writes it"
        ) from None
    return summary


def read_loop(directory: Path) -> LoopRun:
    """Reads the run directory of a loop.

    Raises:
        DataError: The directory has no summary.
    """
    summary = read_summary(directory)
    sampled = [row["iteration"] for row in summary["iterations"] if "sampled" in row]
    return LoopRun(read_run(directory), summary, _readings(directory, sampled[-1]) if sampled else ())


def _readings(directory: Path, iteration: int) -> list[Reading]:
    """Returns up to `OF_A_KIND` completions of each kind, drawn by a hash; those with a known prompt come first."""
    place = directory / f"iteration-{iteration:02d}"
    keys = {key for name in ("sample", "rationalize") if (key := _key_of(place / f"{name}.json"))}
    samples: dict[tuple[str, str, int], dict[str, Any]] = {}
    for line in _lines(directory / STORE, _SampleLine, _VerdictLine, keys=keys):
        name = (line["purpose"], line["problem"], line["index"])
        if line["kind"] == "sample":
            samples.setdefault(name, line)
        elif name in samples:
            samples[name] |= {key: line[key] for key in ("answer", "correct", "failure")}
    inside: dict[tuple[str, str, int], bool | None] = {}
    prompts: dict[str, str] = {}
    for line in _lines(place / KEPT, _KeptLine):
        if line["iteration"] == iteration:
            inside[line["source"], line["problem"], line["index"]] = line["right_inside"]
        prompts.setdefault(line["problem"], line["prompt"])
    found: dict[str, list[Reading]] = {kind: [] for kind in (RIGHT, RIGHT_BUT, WRONG, HINTED, HINTED_BUT)}
    for name in sorted(samples, key=lambda one: (one[1] not in prompts, hashlib.sha256(repr(one).encode()).digest())):
        kind = _kind(samples[name], inside.get(name))
        if kind is not None and len(found[kind]) < OF_A_KIND:
            found[kind].append(_reading(kind, samples[name], prompts.get(name[1])))
    return [reading for readings in found.values() for reading in readings]


def _kind(sample: Mapping[str, Any], right_inside: bool | None) -> str | None:
    hinted = sample["purpose"] == "rationalize"
    if "correct" not in sample or (hinted and not sample["correct"]):
        return None
    if not sample["correct"]:
        return WRONG
    if right_inside is False:
        return HINTED_BUT if hinted else RIGHT_BUT
    return HINTED if hinted else RIGHT


def _reading(kind: str, sample: Mapping[str, Any], prompt: str | None) -> Reading:
    return Reading(
        kind,
        sample["problem"],
        prompt,
        sample["text"],
        sample["answer"],
        sample["tokens"],
        sample["finish_reason"] == "length",
        sample["failure"],
    )


def _key_of(manifest: Path) -> str | None:
    try:
        return str(read_json_file(manifest)["outputs"]["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lines(file: Path, *kinds: type, keys: set[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yields the lines of some kinds, of a file or of the phases in `keys`; a missing file or torn line is skipped."""
    marks = None if keys is None else [key.encode() for key in keys]
    try:
        with open_file(file) as lines:
            for raw in read_lines(lines, MAX_JSON_BYTES):
                # a look at the bytes is far faster than parsing all lines
                if raw is None or (marks is not None and not any(mark in raw for mark in marks)):
                    continue
                try:
                    line = parse_json(raw, surrogates=True)
                except ValueError:
                    continue
                if any(_fits(line, kind) for kind in kinds) and (keys is None or line.get("key") in keys):
                    yield line
    except (OSError, DataError):
        return


def _fits(line: Any, kind: type) -> bool:
    try:
        check_type(line, kind, "line")
    except DataError:
        return False
    return True


def percent(share: float | None) -> str:
    """Returns a share in per cent with one decimal; empty for None."""
    return "" if share is None else f"{100 * share:.1f}"


def interval(value: Row, mean: str = "mean") -> str:
    """Returns a mean in per cent with the ends of its interval, if it has one."""
    ends = value.get("low"), value.get("high")
    return percent(value[mean]) + (f" [{percent(ends[0])}, {percent(ends[1])}]" if None not in ends else "")


def difference(value: Row) -> str:
    """Returns a mean difference in percentage points with the ends of its interval, if it has one, all with signs."""
    numbers = [value["mean"], value.get("low"), value.get("high")]
    texts = [f"{100 * one:+.1f}".replace("-", MINUS) for one in numbers if one is not None]
    return texts[0] + (f" [{texts[1]}, {texts[2]}]" if len(texts) == 3 else "")


def excludes_zero(value: Row) -> bool:
    """Returns whether a difference has an interval that excludes 0."""
    low, high = value.get("low"), value.get("high")
    return low is not None and high is not None and (low > 0 or high < 0)


def _count(*path: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value: Any = row
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return "" if value is None else f"{value:,}"

    return cell


def _inside(row: Row) -> str:
    built = row.get("built", {})
    shares = [built.get(f"right_inside_{source}") for source in ("sample", "rationalize")]
    return "" if shares == [None, None] else " | ".join(percent(share) or "-" for share in shares)


def _hinted(row: Row) -> str:
    built = row.get("built", {})
    return percent(built["hinted"] / built["kept"]) if built.get("hinted") and built.get("kept") else ""


COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "iteration": lambda row: str(row["iteration"]),
    "held-out accuracy": lambda row: interval(row["held_out"], "accuracy") if "held_out" in row else "",
    "sampled right": lambda row: percent(row.get("sampled", {}).get("accuracy")),
    "solved": _count("sampled", "solved"),
    "newly solved": _count("newly_solved"),
    "lost": _count("lost"),
    "rationalised": _count("rationalized", "solved"),
    "kept": _count("built", "kept"),
    "hinted": _hinted,
    "right inside": _inside,
    "distinct": lambda row: f"{row['distinct']['mean']:.2f}" if row.get("distinct") else "",
    "steps": _count("trained", "steps"),
    "cut off": lambda row: percent(row.get("sampled", {}).get("truncated")),
}
"""Columns of the table of iterations, each with the function that makes its cell; shares are in per cent."""
MEANINGS = {
    "held-out accuracy": "greedy, after the iteration, with its 95 % interval over problems",
    "sampled right": "samples of training problems, by the model before the iteration",
    "solved": "training problems with a right sample",
    "rationalised": "failures that came back right with the answer as a hint",
    "hinted": "their share of what was kept",
    "right inside": "share of the kept completions whose every step is right, sampled | rationalised",
    "distinct": "different right solutions of a problem",
    "steps": "of fine-tuning",
    "cut off": "samples that reached the limit of tokens",
}


def explanation(head: Sequence[str]) -> str:
    """Returns a sentence about the meaning of the columns."""
    return f"Shares in per cent; {'; '.join(f'{name}: {MEANINGS[name]}' for name in head if name in MEANINGS)}."


def iteration_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Returns the names of the columns that are not empty, and the cells of each iteration."""
    columns = {name: [cell(row) for row in rows] for name, cell in COLUMNS.items()}
    there = {name: cells for name, cells in columns.items() if any(cells)}
    return list(there), [list(cells) for cells in zip(*there.values(), strict=True)]


def way_name(way: Way) -> str:
    """Returns the name of a way to choose."""
    measure, score = way
    if score is None:
        return {"pass": "any of k right (pass@k)", "maj": "majority vote (maj@k)"}.get(measure, measure)
    return f"best by {score}" if measure == "best-of" else f"vote weighted by {score}"


def ways(candidates: Row) -> dict[Way, dict[int, Row]]:
    """Returns the value of each way to choose at each k: pass@k first, then the compared score, other scores, votes."""
    found: dict[Way, dict[int, Row]] = {}
    for row in candidates["rows"]:
        found.setdefault((row["measure"], row["score"]), {})[row["k"]] = row["value"]
    first: list[Way] = [PASS, ("best-of", candidates.get("compared"))]
    order = {"best-of": 0, "maj": 1, "weighted-vote": 2}
    rest = sorted((way for way in found if way not in first), key=lambda way: order.get(way[0], 3))
    return {way: found[way] for way in first + rest if way in found}


def main_ways(candidates: Row) -> list[Way]:
    """Returns the ways to choose that a chart has room for, at most `MOST_LINES`, in the order of `ways`.

    They are the upper bound pass@k, the compared score, the majority vote, and one score of each other model. Scores
    are named `model (score)`; of another model's scores the one that is computed like the compared score is taken, or
    else the first.

    Args:
        candidates: `CandidateTable.to_json()` with `compared`; the result is empty without rows.
    """
    found = ways(candidates) if candidates.get("rows") else {}
    compared = str(candidates.get("compared"))
    scores = [str(score) for measure, score in found if measure == "best-of"]
    of_model: dict[str, str] = {}
    for score in sorted(scores, key=lambda score: (score != compared, _how(score) != _how(compared))):
        of_model.setdefault(score.partition(" (")[0], score)
    chosen: list[Way] = [PASS, ("best-of", compared), MAJORITY]
    chosen += [("best-of", score) for score in scores if score in of_model.values() and score != compared]
    kept = [way for way in chosen if way in found][:MOST_LINES]
    return [way for way in found if way in kept]


def _how(score: str) -> str:
    return score.partition(" (")[2]


def differences(candidates: Row) -> dict[Way, dict[int, Row]]:
    """Returns Best-of-k of the compared score minus each other way to choose, at each k."""
    found: dict[Way, dict[int, Row]] = {}
    for one in candidates.get("differences", ()):
        found.setdefault((one["measure"], one["other"]), {})[one["k"]] = one["value"]
    order = [way for way in ways(candidates) if way in found]
    return {way: found[way] for way in order}


def ks_of(table: Mapping[Way, Mapping[int, Row]]) -> list[int]:
    """Returns all values of k, ascending."""
    return sorted({k for values in table.values() for k in values})


def grid(
    table: Mapping[Way, Mapping[int, Row]], cell: Callable[[Row], str], name: Callable[[Way], str] = way_name
) -> tuple[list[str], list[list[str]]]:
    """Returns columns and cells of a table with a row for each way to choose and a column for each k."""
    ks = ks_of(table)
    rows = [[name(way), *(cell(values[k]) if k in values else "" for k in ks)] for way, values in table.items()]
    return ["", *(f"k = {k}" for k in ks)], rows


def natural(name: str) -> list[tuple[int, int | str]]:
    """Returns a sort key that orders names by the numbers in them: `2 digits` before `10 digits`."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


def printable(text: str) -> str:
    """Replaces characters that could control a terminal: task files and models write parts of names and messages."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """Returns a table as lines of at most `width` characters; columns that do not fit follow below the others.

    The first column is repeated in front of them.
    """
    head, rows = list(map(printable, head)), [list(map(printable, row)) for row in rows]
    heads = [name.split(" ") if len(name) > 9 and place else [name] for place, name in enumerate(head)]
    tops = [list(line) for line in zip_longest(*(one[::-1] for one in heads), fillvalue="")][::-1]
    sizes = [max(map(len, column)) for column in zip(*tops, *rows, strict=True)]
    blocks: list[list[int]] = [[]]
    for place in range(1, len(sizes)):
        used = sizes[0] + sum(sizes[one] + 2 for one in blocks[-1])
        if blocks[-1] and used + sizes[place] + 2 > width:
            blocks.append([])
        blocks[-1].append(place)
    parts = []
    for block in blocks:
        lines = [
            "  ".join([line[0].ljust(sizes[0]), *(line[place].rjust(sizes[place]) for place in block)]).rstrip()
            for line in [*tops, *rows]
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
