"""How far a mean over problems can be trusted: percentile bootstrap intervals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from quietstar.errors import ConfigError, DataError
from quietstar.evaluation.arguments import Array, numbers, same_length

RESAMPLES = 1000
CONFIDENCE = 0.95
BLOCK = 1 << 22
"""Numbers drawn at once, which bounds the memory."""


@dataclass(frozen=True)
class Interval:
    """A mean over problems; one problem alone says nothing of the spread.

    Args:
        mean: Of the values.
        low: Where the interval begins, or None.
        high: Where it ends, or None.
        problems: How many values.
    """

    mean: float
    low: float | None
    high: float | None
    problems: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]")

    @property
    def above_zero(self) -> bool:
        """Whether there is an interval and all of it is above 0."""
        return self.low is not None and self.low > 0

    @property
    def below_zero(self) -> bool:
        """Whether there is an interval and all of it is below 0."""
        return self.high is not None and self.high < 0


def bootstrap_interval(
    values: ArrayLike, resamples: int = RESAMPLES, seed: int = 0, *, confidence: float = CONFIDENCE
) -> Interval:
    """Mean of per-problem values, and the percentiles of its resampled means.

    Where all values are the same, so are the ends: the problems show no spread, which is not to say that there is none.

    Args:
        values: [problems], one for each, finite.
        resamples: Draws of as many problems with replacement, at least 1.
        seed: Of the draws.
        confidence: 0 to 1, exclusive.

    Raises:
        DataError: There is no value, or one is not finite.
        ConfigError: `resamples` or `confidence` is out of its range.
    """
    return bootstrap_intervals(numbers("values", values)[:, None], resamples, seed, confidence=confidence)[0]


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    resamples: int = RESAMPLES,
    seed: int = 0,
    *,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Interval of the mean of `first` - `second`, whose values are of the same problems in the same order.

    Args:
        first: [problems].
        second: [problems].
        resamples: As for `bootstrap_interval`, as are the rest and the errors.
        seed: Of the draws.
        confidence: 0 to 1, exclusive.
    """
    first, second = numbers("first", first), numbers("second", second)
    same_length(first=first, second=second)
    return bootstrap_interval(first - second, resamples, seed, confidence=confidence)


def bootstrap_intervals(
    values: Array, resamples: int = RESAMPLES, seed: int = 0, *, confidence: float = CONFIDENCE
) -> list[Interval]:
    """The same for several measures, float64 [problems, measures], which all see the same draws of problems."""
    if resamples < 1:
        raise ConfigError(f"resamples: is {resamples}; needs at least 1")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence: is {confidence}; needs a share between 0 and 1")
    if not np.isfinite(values).all():
        raise DataError(f"values: {values[~np.isfinite(values)][0]}; needs finite numbers")
    problems = len(values)
    means = values.mean(0).tolist()
    if problems == 1:
        return [Interval(mean, None, None, 1) for mean in means]
    resampled = np.concatenate([counts @ values for counts in _draws(problems, resamples, seed)]) / problems
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0).tolist()
    return [Interval(*ends, problems) for ends in zip(means, low, high, strict=True)]


def _draws(problems: int, resamples: int, seed: int) -> Iterator[Array]:
    """How often each draw has each problem, float64 [some draws, problems]."""
    random = np.random.default_rng(seed)
    block = max(1, BLOCK // problems)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = random.integers(problems, size=(rows, problems)) + problems * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * problems).reshape(rows, problems).astype(np.float64)
