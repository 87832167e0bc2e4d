"""How lm-eval makes one number of a task's documents: which of its functions does, and how sure the number is."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from quietstar.evaluation.bootstrap import CONFIDENCE, RESAMPLES, Interval

Aggregation = Callable[[Sequence[Any]], float]
MEAN = "mean"
CORPUS = ("bleu", "chrf", "chrf++", "ter")
CORPUS_RESAMPLES = 100
"""Of a corpus metric, each of which reads all texts again; lm-eval's own number."""


def aggregation_of(
    config: Mapping[str, Any], place: str, items: Mapping[str, Any], scores: Mapping[str, float]
) -> str | None:
    """The name of lm-eval's function that makes a metric's number of its documents.

    Args:
        config: Of the task.
        place: `metric,filter`.
        items: What the metric keeps of each document.
        scores: lm-eval's numbers, by place.

    Returns:
        The function that the task names, or the metric's own, or the mean, if it gives lm-eval's number; the mean also
        where documents without a number are why there is none. None where the task has a function of its own.
    """
    metric, score = place.partition(",")[0], scores.get(place, math.nan)
    registry: Any = importlib.import_module("lm_eval.api.registry")
    default = registry.get_metric_aggregation(metric)
    given = [one.get("aggregation") for one in config.get("metric_list") or [] if one.get("metric") == metric]
    names: list[str] = [name for name in given if isinstance(name, str)]
    names += [name for name, one in _registry().items() if one is default]
    if not math.isfinite(score):
        return MEAN if names[:1] in ([], [MEAN]) and any(map(is_finite, items.values())) else None
    for name in [*names, MEAN]:
        function = _registered(name)
        try:
            if function is not None and math.isclose(function(list(items.values())), score, rel_tol=1e-6, abs_tol=1e-9):
                return name
        except (ArithmeticError, ValueError, TypeError, IndexError):
            continue
    return None


def resampled(
    name: str, off: Sequence[Any], on: Sequence[Any], seed: int
) -> tuple[Interval, Interval, Interval] | None:
    """An aggregation of the documents and of draws of as many of them, the same ones on both sides.

    Returns:
        Intervals without thinking, with it, and of the difference; None where a draw gives no finite number.
    """
    function, count = _registered(name), len(off)
    if function is None or count < 2:
        return None
    random = np.random.default_rng(seed)
    found = []
    try:
        means = function(off), function(on)
        for _ in range(CORPUS_RESAMPLES if name in CORPUS else RESAMPLES):
            drawn = random.integers(count, size=count).tolist()
            found.append([function([side[one] for one in drawn]) for side in (off, on)])
    except (ArithmeticError, ValueError):  # such as a perplexity that is too large for a number
        return None
    draws = np.array(found, dtype=np.float64)
    columns = [draws[:, 0], draws[:, 1], draws[:, 1] - draws[:, 0]]
    if not np.isfinite(draws).all():
        return None
    points = (float(means[0]), float(means[1]), float(means[1] - means[0]))
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    ends = [np.quantile(column, tails).tolist() for column in columns]
    off_mean, on_mean, change = (
        Interval(point, low, high, count) for point, (low, high) in zip(points, ends, strict=True)
    )
    return off_mean, on_mean, change


def is_finite(value: Any) -> bool:
    """Whether a value is a number, neither infinite nor NaN."""
    return isinstance(value, (bool, int, float)) and math.isfinite(value)


def _registry() -> Mapping[str, Aggregation]:
    metrics: Any = importlib.import_module("lm_eval.api.metrics")  # registers them
    assert metrics is not None
    registry: Any = importlib.import_module("lm_eval.api.registry")
    names: Mapping[str, Aggregation] = registry.AGGREGATION_REGISTRY
    return {name: names[name] for name in names}


def _registered(name: str) -> Aggregation | None:
    return _registry().get(name)
