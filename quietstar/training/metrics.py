"""`metrics.jsonl`: one JSON object per line, `step` and `split` first, then numbers, in the order of the steps."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from quietstar.errors import DataError


class MetricsWriter:
    """Appends to a `metrics.jsonl` and flushes every line.

    Args:
        path: The file; made where it does not exist.
        keep_steps: Lines of an earlier run up to and including this step stay, later ones are cut off: they are about
            to be written again, because training continues from the checkpoint of this step. -1 keeps none.

    Raises:
        DataError: A line that would stay is not one of ours.
    """

    def __init__(self, path: Path, *, keep_steps: int) -> None:
        self.path = path
        if path.exists():
            size = _size_up_to(path, keep_steps)
            os.truncate(path, size)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Appends one line. NaN and infinities become null: JSON has no word for them.

        Args:
            step: Optimizer steps done.
            split: `train` or `eval`.
            values: Must not contain `step` or `split`.
        """
        line = json.dumps({"step": step, "split": split, **without_non_finite(values)}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Returns when everything written is on the disk, so that a checkpoint never knows of a line that is lost."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


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
