"""`metrics.jsonl`: one JSON object per line, `step` and `split` first, then numbers, in the order of the steps.

What the reports of a run depend on besides the step.
"""

from __future__ import annotations

import errno
import json
import math
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from quietstar.errors import DataError


class MetricsWriter:
    """Appends to a `metrics.jsonl` and flushes every line.

    A line that cannot be written (a full disk) is kept, with a warning, and written before the next one.

    Args:
        path: The file; made where it does not exist.
        keep_steps: Lines of an earlier run up to and including this step stay, later ones are cut off: they are about
            to be written again, because training continues from the checkpoint of this step. -1 keeps none.

    Raises:
        DataError: A line that would stay is not one of ours.
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
        """Appends one line. NaN and infinities become null: JSON has no word for them.

        Args:
            step: Optimizer steps done.
            split: `train` or `eval`.
            values: Must not contain `step` or `split`.
        """
        line = json.dumps({"step": step, "split": split, **without_non_finite(values)}, allow_nan=False)
        self._waiting += line.encode() + b"\n"
        try:
            self._write_waiting()
        except OSError as error:
            warnings.warn(f"{self.path}: the line of step {step} must wait ({error.strerror})", stacklevel=2)

    def sync(self) -> None:
        """Returns when everything written is on the disk, so that a checkpoint never knows of a line that is lost.

        Raises:
            OSError: It cannot be written.
        """
        self._write_waiting()
        os.fsync(self._file.fileno())

    def cut(self, step: int) -> None:
        """Takes back the lines after a step, because training goes back to it."""
        self._waiting = b""
        self._size = _size_up_to(self.path, step)
        os.truncate(self.path, self._size)

    def close(self) -> None:
        """Closes the file; what could not be written by now is lost."""
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
        path: The file. A last line without its line end, from a run that was killed while writing it, is left out.
        split: `train` or `eval` for only those lines.

    Returns:
        The lines as dicts, in order; null is NaN.

    Raises:
        DataError: naming the file and the line that is not one of ours.
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
    """The same numbers with None, JSON's null, for NaN and infinities."""
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
        line = json.loads(raw)
    except ValueError as error:
        raise DataError(f"{path}:{number}: not JSON ({error}); needs one metrics object per line") from None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int) or not isinstance(line.get("split"), str):
        raise DataError(f"{path}:{number}: needs an object with an integer `step` and a text `split`")
    return line


class WeightedMeans:
    """Means over the micro-batches of a step."""

    def __init__(self) -> None:
        self.weight = 0.0
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, values: Mapping[str, float], weight: float) -> None:
        """Counts what one micro-batch has measured."""
        self.weight += weight
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * weight
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def values(self) -> dict[str, float]:
        """The means so far."""
        return {name: total / self._weights[name] for name, total in self._sums.items()}


@dataclass
class Record:
    """Saved with every checkpoint, so that metrics.jsonl is exact after a resume.

    Args:
        sums, counts: Of the steps' metrics since the last logged step.
        skipped: Steps skipped since the last logged step.
        failures: Steps with NaN or infinity, one after another, up to this step.
        last_train, last_eval: The last lines of metrics.jsonl.
        best_eval, best_eval_step: The line with the smallest loss, and its step.
        seconds: Wall-clock time of the run.
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

    def add(self, values: Mapping[str, float]) -> None:
        """Counts the metrics of one step."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def take_means(self) -> dict[str, float]:
        """Means since the last call; `loss` is NaN where every step was skipped, and never 0."""
        means = {"loss": math.nan} | {name: total / self.counts[name] for name, total in self.sums.items()}
        if self.skipped:
            means["skipped_steps"] = float(self.skipped)
        self.sums, self.counts, self.skipped = {}, {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        state = asdict(self)
        for key in _NUMBERS:
            state[key] = None if state[key] is None else without_non_finite(state[key])
        return state

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> Record:
        """Takes back what `state_dict` gave."""
        numbers = {
            key: None if state[key] is None else {k: math.nan if v is None else v for k, v in state[key].items()}
            for key in _NUMBERS
        }
        return Record(**{**state, **numbers})


_NUMBERS = ("sums", "last_train", "last_eval", "best_eval")


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run reports.

    Args:
        steps: Optimizer steps done, earlier parts of a resumed run included.
        train_metrics: The last `train` line of metrics.jsonl.
        eval_metrics: The last `eval` line; empty if there was none.
        best_eval: The `eval` line with the smallest `best_metric`.
        best_eval_step: Its step.
        checkpoint: The last checkpoint, a model directory.
        seconds: Wall-clock time of the run, earlier parts included.
    """

    steps: int
    train_metrics: dict[str, float]
    eval_metrics: dict[str, float]
    best_eval: dict[str, float] | None
    best_eval_step: int | None
    checkpoint: Path
    seconds: float
