"""What the reports of a run depend on besides the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from quietstar.training.metrics import without_non_finite


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
