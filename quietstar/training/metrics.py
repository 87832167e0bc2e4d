"""The metrics of a run: `metrics.jsonl`, and the record that is saved with each checkpoint.

`metrics.jsonl` has one JSON object per line, `step` and `split` first, then numbers, in the order of the steps.
"""

from __future__ import annotations

import errno
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from quietstar.config.parsing import check_type, parse_json
from quietstar.errors import DataError
from quietstar.runs.directory import is_metrics_line

_NUMBERS = ("sums", "last_train", "last_eval", "best_eval")


class MetricsWriter:
    """Appends to a `metrics.jsonl` and flushes every line.

    A line that cannot be written (a full disk) is kept, with a warning, and written before the next one.

    Args:
        path: Path of the file, made where it does not exist.
        keep_steps: Last step of an earlier run whose lines stay. Later lines are cut off, because training continues
            from the checkpoint of this step and will write them again. -1 keeps none.

    Raises:
        DataError: A line that would stay is not a line of metrics.
    """

    def __init__(self, path: Path, *, keep_steps: int) -> None:
        self.path = path
        self._waiting = b""
        if path.exists():
            os.truncate(path, _size_up_to(path, keep_steps))
        # unbuffered: what a failed write leaves in a buffer would be written a second time
        self._file = path.open("ab", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Appends one line. NaN and infinities become null, because JSON does not have them.

        Args:
            step: Number of optimizer steps done.
            split: Kind of the line, `train` or `eval`.
            values: Numbers by name; the names `step` and `split` are not allowed.
        """
        line = json.dumps({"step": step, "split": split, **without_non_finite(values)}, allow_nan=False)
        self._waiting += line.encode() + b"\n"
        try:
            self._write_waiting()
        except OSError as error:
            warnings.warn(f"{self.path}: the line of step {step} must wait ({error.strerror})", stacklevel=2)

    def sync(self) -> None:
        """Returns when everything written is on the disk, so that a checkpoint never counts a line that is lost.

        Raises:
            OSError: A line cannot be written.
        """
        self._write_waiting()
        os.fsync(self._file.fileno())

    def cut(self, step: int) -> None:
        """Removes the lines after a step, because training goes back to this step."""
        self._waiting = b""
        self._size = _size_up_to(self.path, step)
        os.truncate(self.path, self._size)

    def close(self) -> None:
        """Closes the file; a line that still cannot be written is lost."""
        with suppress(OSError):
            self._write_waiting()
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_waiting(self) -> None:
        if not self._waiting:
            return
        try:
            written = self._file.write(self._waiting)
            if written < len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.truncate(self.path, self._size)  # half a line would spoil the next one
            raise
        self._size += written
        self._waiting = b""


def read_metrics(path: Path | str, split: str | None = None) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl`.

    Args:
        path: Path of the file. A last line without a line end, from a run that was killed while writing, is left out.
        split: Kind of the lines to return, `train` or `eval`; None returns all.

    Returns:
        The lines as dicts, in order; null becomes NaN.

    Raises:
        DataError: A line is not a line of metrics; the message names the file and the line.
    """
    path = Path(path)
    lines = []
    for number, raw in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not raw.endswith(b"\n"):
            break
        line = _parse(path, number, raw)
        if split is None or line["split"] == split:
            lines.append({key: math.nan if value is None else value for key, value in line.items()})
    return lines


def without_non_finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """Returns the same numbers with None, JSON's null, for NaN and infinities."""
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def _size_up_to(path: Path, step: int) -> int:
    size = 0
    for number, raw in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not raw.endswith(b"\n") or _parse(path, number, raw)["step"] > step:
            break
        size += len(raw)
    return size


def _parse(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    try:
        line = parse_json(raw)
    except ValueError as error:
        raise DataError(f"{path}:{number}: not JSON ({error}); needs one metrics object per line") from None
    if not is_metrics_line(line):
        raise DataError(
            f"{path}:{number}: needs an object with an integer `step`, a text `split`, and numbers or null besides"
        )
    return dict(line)


class WeightedMeans:
    """Weighted means over the micro-batches of a step.

    Attributes:
        weight: Sum of the weights so far.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, values: Mapping[str, float], weight: float) -> None:
        """Adds the values of one micro-batch."""
        self.weight += weight
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * weight
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def over(self, total: Callable[[Tensor], Tensor]) -> WeightedMeans:
        """Returns the means over what several ranks have added, given the function that sums over them."""
        numbers = [self.weight, *self._sums.values(), *self._weights.values()]
        weight, *rest = total(torch.tensor(numbers, dtype=torch.float64)).tolist()
        means = WeightedMeans()
        means.weight = weight
        means._sums = dict(zip(self._sums, rest[: len(self._sums)], strict=True))
        means._weights = dict(zip(self._weights, rest[len(self._sums) :], strict=True))
        return means

    def values(self) -> dict[str, float]:
        """Returns the means so far, by name."""
        return {name: total / self._weights[name] for name, total in self._sums.items()}


@dataclass
class Record:
    """The state of a run's metrics. It is saved with every checkpoint, so that metrics.jsonl is exact after a resume.

    Args:
        sums, counts: Sums of each metric over the steps since the last logged step, and the numbers of their terms.
        skipped: Number of steps skipped since the last logged step.
        failures: Number of consecutive steps with NaN or infinity, up to this step.
        last_train, last_eval: Metrics of the last `train` line and the last `eval` line of metrics.jsonl.
        best_eval, best_eval_step: Metrics of the best evaluation so far, and the step of this evaluation.
        seconds: Wall-clock time of the run, in seconds.
    """

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    skipped: int = 0
    failures: int = 0
    last_train: dict[str, float] = field(default_factory=dict)
    last_eval: dict[str, float] = field(default_factory=dict)
    best_eval: dict[str, float] | None = None
    best_eval_step: int | None = None
    seconds: float = 0.0

    def result(self, steps: int, checkpoint: Path) -> TrainingResult:
        """Returns the result of a run.

        Args:
            steps: Number of optimizer steps done.
            checkpoint: Directory of the newest checkpoint.
        """
        return TrainingResult(
            steps=steps,
            train_metrics=self.last_train,
            eval_metrics=self.last_eval,
            best_eval=self.best_eval,
            best_eval_step=self.best_eval_step,
            checkpoint=checkpoint,
            seconds=self.seconds,
        )

    def add(self, values: Mapping[str, float]) -> None:
        """Adds the metrics of one step."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def take_means(self) -> dict[str, float]:
        """Returns the means since the last call; `loss` is NaN, never 0, where every step was skipped."""
        means = {"loss": math.nan} | {name: total / self.counts[name] for name, total in self.sums.items()}
        if self.skipped:
            means["skipped_steps"] = float(self.skipped)
        self.sums, self.counts, self.skipped = {}, {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """Returns the record as plain JSON values."""
        state = asdict(self)
        for key in _NUMBERS:
            state[key] = None if state[key] is None else without_non_finite(state[key])
        return state

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> Record:
        """Makes a record from what `state_dict` returned.

        Raises:
            DataError: `state` is not the state of a record.
        """
        hints = get_type_hints(Record)
        if unknown := sorted(state.keys() ^ hints.keys()):
            raise DataError(f"record: {unknown[0]} is {'unknown' if unknown[0] in state else 'missing'}")
        for key, value in state.items():
            check_type(value, dict[str, float | None] | None if key in _NUMBERS else hints[key], f"record.{key}")
            if value is None and type(None) not in get_args(hints[key]):
                raise DataError(f"record.{key}: got None, needs an object")
        numbers = {
            key: None if state[key] is None else {k: math.nan if v is None else v for k, v in state[key].items()}
            for key in _NUMBERS
        }
        return Record(**{**state, **numbers})


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run reports.

    Args:
        steps: Number of optimizer steps done, earlier parts of a resumed run included.
        train_metrics: Metrics of the last `train` line of metrics.jsonl.
        eval_metrics: Metrics of the last `eval` line; empty if there was none.
        best_eval: Metrics of the `eval` line with the smallest `best_metric`; None if there was none.
        best_eval_step: Step of the evaluation that gave `best_eval`; None if there was none.
        checkpoint: Path of the last checkpoint, which is a model directory.
        seconds: Wall-clock time of the run in seconds, earlier parts included.
    """

    steps: int
    train_metrics: dict[str, float]
    eval_metrics: dict[str, float]
    best_eval: dict[str, float] | None
    best_eval_step: int | None
    checkpoint: Path
    seconds: float
