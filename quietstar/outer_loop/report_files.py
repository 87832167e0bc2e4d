"""Reads what a loop has written: its summary, its options, and a few completions of its last iteration."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quietstar.errors import DataError
from quietstar.outer_loop.store import STORE
from quietstar.outer_loop.summary import SUMMARY
from quietstar.outer_loop.training_set import KEPT
from quietstar.reporting.run_directory import RunDirectory, read_run

OF_A_KIND = 3
RIGHT, RIGHT_BUT, WRONG, HINTED, HINTED_BUT = (
    "right",
    "right answer, but a wrong step inside",
    "wrong",
    "rationalised: right with the answer as a hint",
    "rationalised: right answer, but a wrong step inside",
)
_SECONDS = re.compile(r"([0-9.]+) s")


@dataclass(frozen=True)
class Reading:
    """A completion to read.

    Args:
        kind: Of the five above.
        problem: Id of its problem.
        prompt: Without solved examples and hint; None where it is not known.
        text: The completion.
        answer: Found in it; None without one.
        tokens: Of the completion.
        truncated: Whether it reached the limit of tokens.
        failure: Why its check did not come to an end.
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
        summary: `summary.json`.
        readings: A few completions of the last iteration that has sampled, by kind.
    """

    files: RunDirectory
    summary: dict[str, Any]
    readings: Sequence[Reading] = ()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The iterations of the summary."""
        rows: list[dict[str, Any]] = self.summary["iterations"]
        return rows

    @property
    def candidates(self) -> dict[str, Any] | None:
        """What was measured on candidates."""
        return self.summary.get("candidates")

    def seconds(self) -> dict[str, float]:
        """Time of each kind of phase over all iterations, by name, as far as the events tell."""
        found: dict[str, float] = {}
        for event in self.files.events:
            name, _, what = str(event["event"]).rpartition(" ")
            match = _SECONDS.fullmatch(str(event.get("message")))
            if name and what == "finished" and match:
                found[name] = found.get(name, 0.0) + float(match[1])
        return found


def read_summary(directory: Path) -> dict[str, Any]:
    """`summary.json` of a run.

    Raises:
        DataError: It is missing, or is none.
    """
    file = directory / SUMMARY
    try:
        summary: dict[str, Any] = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{directory}: has no {SUMMARY}, which a run writes when its iterations are done; run its command again"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: cannot be read ({error}); run the command of this run again, which writes it"
        ) from None
    rows = summary.get("iterations") if isinstance(summary, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) and "iteration" in r for r in rows):
        raise DataError(f"{file}: has no list of iterations; needs the {SUMMARY} of a run of STaR or V-STaR")
    return summary


def read_loop(directory: Path) -> LoopRun:
    """Reads a run directory.

    Raises:
        DataError: It has no summary.
    """
    summary = read_summary(directory)
    sampled = [row["iteration"] for row in summary["iterations"] if "sampled" in row]
    return LoopRun(read_run(directory), summary, _readings(directory, sampled[-1]) if sampled else ())


def _readings(directory: Path, iteration: int) -> list[Reading]:
    """A few of each kind, drawn by a hash, and first those whose prompt is known."""
    place = directory / f"iteration-{iteration:02d}"
    keys = {key for name in ("sample", "rationalize") if (key := _key_of(place / f"{name}.json"))}
    samples: dict[tuple[str, str, int], dict[str, Any]] = {}
    for line in _lines(directory / STORE, keys):
        name = (line["purpose"], line["problem"], line["index"])
        if line["kind"] == "sample":
            samples.setdefault(name, line)
        elif line["kind"] == "verdict" and name in samples:
            samples[name] |= {key: line[key] for key in ("answer", "correct", "failure")}
    inside: dict[tuple[str, str, int], bool | None] = {}
    prompts: dict[str, str] = {}
    for line in _lines(place / KEPT):
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
        return str(json.loads(manifest.read_bytes())["outputs"]["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lines(file: Path, keys: set[str] | None = None) -> Iterator[dict[str, Any]]:
    """The lines of a file, or those of some phases; what is missing or torn counts as not written."""
    marks = None if keys is None else [key.encode() for key in keys]
    try:
        with file.open("rb") as lines:
            for raw in lines:
                if marks is not None and not any(mark in raw for mark in marks):  # far quicker than to parse them all
                    continue
                try:
                    line = json.loads(raw)
                except ValueError:
                    continue
                if keys is None or line.get("key") in keys:
                    yield line
    except OSError:
        return
