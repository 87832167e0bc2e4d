"""The store of every sample of a run, in one file that is only appended to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from quietstar.config.parsing import check_type, parse_json
from quietstar.errors import CheckpointError, ConfigError
from quietstar.runs.files import STORE
from quietstar.sampling.requests import Completion
from quietstar.tasks.task import Verdict

STORE_VERSION = 1
"""Version of the lines and of how samples are made: samples of two versions are not mixed."""


@dataclass(frozen=True)
class Place:
    """The identity of a sample within a run.

    Args:
        iteration: Number of the loop's iteration, from 1; 0 before the first.
        purpose: Purpose that the sample was made for.
        problem: Id of the sample's problem.
        index: Number of the sample among those of its problem, from 0.
    """

    iteration: int
    purpose: Literal["sample", "rationalize", "evaluate", "candidates"]
    problem: str
    index: int


@dataclass(frozen=True)
class Sample:
    """A completion and what is known of it.

    Args:
        place: Identity of the sample within the run.
        key: Key of the phase that made the sample: of model, prompts, sampling options and code.
        seed: Seed of the sample's random stream.
        hinted: Whether the prompt showed the answer.
        generation: Completion with its log-probability and number of tokens.
        verdict: Verdict of the newest check; None before the first.
        check: Key of the phase that checked the sample.
    """

    place: Place
    key: str
    seed: int
    hinted: bool
    generation: Completion
    verdict: Verdict | None = None
    check: str = ""


@dataclass(frozen=True)
class _SampleLine:
    """What the line of a sample holds besides its place and its completion."""

    key: str
    seed: int
    hinted: bool


class SampleStore:
    """Samples and verdicts as JSON lines; each block is appended whole and synced to disk before the loop continues.

    The first line has the version that wrote the file. Every other line is a sample, or the verdict on an earlier one.
    The last verdict counts, so that answers can be checked again without sampling again.

    Args:
        directory: Directory of the run; the file is `samples.jsonl`.
        tell: Function called with a message where an incomplete last line was removed.

    Raises:
        CheckpointError: The file was written by another version, or a line other than the last is damaged.
        ConfigError: The file cannot be written to.
    """

    def __init__(self, directory: Path, tell: Callable[[str], None]) -> None:
        self.path = directory / STORE
        self._offsets: dict[tuple[str, str], list[int]] = {}  # byte offsets of lines by kind and phase key
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise ConfigError(f"output_dir: cannot write to {self.path} ({error.strerror})") from None
        try:
            self._read(tell)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SampleStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    def add_samples(self, samples: Iterable[Sample]) -> None:
        """Appends new samples.

        Raises:
            CheckpointError: The samples cannot be written; the lines that are there already stay.
        """
        self._append("sample", ((sample.key, _sample_line(sample)) for sample in samples))

    def add_verdicts(self, samples: Iterable[Sample]) -> None:
        """Appends the verdicts of samples that are there already.

        Raises:
            CheckpointError: The verdicts cannot be written; the lines that are there already stay.
        """
        self._append("verdict", ((sample.key, _verdict_line(sample)) for sample in samples))

    def samples(self, key: str) -> dict[tuple[str, int], Sample]:
        """Returns the samples of a phase by problem and index, each with its last verdict."""
        found: dict[tuple[str, int], Sample] = {}
        for line in self._lines("sample", key):
            sample = _sample(line)
            found.setdefault((sample.place.problem, sample.place.index), sample)
        for line in self._lines("verdict", key):
            name, verdict = _verdict(line)
            if name in found:
                found[name] = replace(found[name], verdict=verdict, check=line.get("check", ""))
        return found

    def _read(self, tell: Callable[[str], None]) -> None:
        with self.path.open("rb") as file:
            self._read_lines(file, tell)
        if os.fstat(self._descriptor).st_size == 0:
            self._append("header", [("", {"version": STORE_VERSION})])

    def _read_lines(self, file: BinaryIO, tell: Callable[[str], None]) -> None:
        offset, size = 0, os.fstat(self._descriptor).st_size
        for number, raw in enumerate(file, start=1):
            try:
                line = parse_json(raw, surrogates=True)
                kind, key = line["kind"], line.get("key", "")
                if number > 1:
                    {"sample": _sample, "verdict": _verdict}[kind](line)
                if not raw.endswith(b"\n"):
                    raise ValueError("no end of line")
            except (ValueError, KeyError, TypeError) as error:
                if offset + len(raw) < size:
                    raise CheckpointError(
                        f"{self.path}:{number}: damaged ({error}); delete this line: its sample is made again"
                    ) from None
                os.ftruncate(self._descriptor, offset)
                tell(f"{self.path}:{number}: the last line was torn ({len(raw)} bytes) and is cut off")
                break
            if number == 1 and (kind != "header" or line.get("version") != STORE_VERSION):
                raise CheckpointError(
                    f"{self.path}: written by version {line.get('version')} of the store, this is {STORE_VERSION}, and "
                    "samples of two versions are not mixed; choose another --output_dir"
                )
            self._offsets.setdefault((kind, key), []).append(offset)
            offset += len(raw)

    def _append(self, kind: str, lines: Iterable[tuple[str, dict[str, Any]]]) -> None:
        start = os.fstat(self._descriptor).st_size
        block, places = bytearray(), []
        for key, values in lines:
            places.append((key, start + len(block)))
            text = json.dumps({"kind": kind, "key": key, **values}, ensure_ascii=False)
            block += text.encode("utf-8", "backslashreplace") + b"\n"  # a lone surrogate is not UTF-8
        if not block:
            return
        try:
            written = 0
            while written < len(block):
                written += os.write(self._descriptor, memoryview(block)[written:])
            os.fsync(self._descriptor)
        except BaseException as error:
            os.ftruncate(self._descriptor, start)  # no incomplete line stays, even after a signal
            if not isinstance(error, OSError):
                raise
            raise CheckpointError(
                f"{self.path}: cannot write ({error.strerror}); the same command goes on from what is there"
            ) from None
        for key, place in places:
            self._offsets.setdefault((kind, key), []).append(place)

    def _lines(self, kind: str, key: str) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:  # an open reader would still buffer lines that were cut off
            for offset in self._offsets.get((kind, key), []):
                file.seek(offset)
                yield parse_json(file.readline(), surrogates=True)


def _sample_line(sample: Sample) -> dict[str, Any]:
    generation = asdict(sample.generation)
    if sample.generation.endpoint is None:
        del generation["endpoint"]
    return {**asdict(sample.place), "seed": sample.seed, "hinted": sample.hinted, **generation}


def _verdict_line(sample: Sample) -> dict[str, Any]:
    assert sample.verdict is not None
    return {**asdict(sample.place), **asdict(sample.verdict), "check": sample.check}


def _sample(line: dict[str, Any]) -> Sample:
    for part in (Place, Completion, _SampleLine):
        check_type(line, part, "sample")
    place = Place(line["iteration"], line["purpose"], line["problem"], line["index"])
    generation = Completion(line["text"], line["logprob"], line["tokens"], line["finish_reason"], line.get("endpoint"))
    return Sample(place, line["key"], line["seed"], line["hinted"], generation)


def _verdict(line: dict[str, Any]) -> tuple[tuple[str, int], Verdict]:
    check_type(line, Place, "verdict")
    check_type(line, Verdict, "verdict")
    return (line["problem"], line["index"]), Verdict(line["answer"], line["correct"], line["failure"])
