"""How far a mean over problems can be trusted: percentile bootstrap intervals.

Checks of what the measures are given.

Intervals of means over things that come in blocks, such as the tokens of a window, which depend on each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quietstar.errors import ConfigError, DataError

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


Array = NDArray[np.float64]


def numbers(name: str, values: ArrayLike) -> Array:
    """The values as float64 [n].

    Raises:
        DataError: There is none, there are several dimensions, or one is not a number.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: {error}; needs numbers") from None
    if array.ndim != 1 or not len(array):
        raise DataError(f"{name}: has the shape {list(array.shape)}; needs one dimension with at least one value")
    if np.isnan(array).any():
        raise DataError(f"{name}: NaN at index {int(np.isnan(array).argmax())}; needs numbers that can be compared")
    return array


def within(name: str, values: ArrayLike, low: float, high: float) -> Array:
    """The same for numbers from `low` to `high`, such as truth values and probabilities.

    Raises:
        DataError: One lies outside.
    """
    array = numbers(name, values)
    outside = (array < low) | (array > high)
    if outside.any():
        index = int(outside.argmax())
        raise DataError(f"{name}: {array[index]:g} at index {index}; needs {low:g} to {high:g}")
    return array


def truths(name: str, values: ArrayLike) -> Array:
    """Truth values as 0.0 and 1.0.

    Raises:
        DataError: One is neither.
    """
    array = within(name, values, 0, 1)
    if ((array != 0) & (array != 1)).any():
        index = int(((array != 0) & (array != 1)).argmax())
        raise DataError(f"{name}: {array[index]:g} at index {index}; needs True or False")
    return array


def same_length(**values: Sized) -> None:
    """Refuses arguments of unequal lengths.

    Raises:
        DataError: naming them with their lengths.
    """
    lengths = {name: len(value) for name, value in values.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise DataError(f"{shown}; they need one value for each of the same candidates")


def check_k(k: int, candidates: int) -> None:
    """Refuses a subset that cannot be drawn.

    Raises:
        ConfigError: `k` is not in 1 to `candidates`.
    """
    if not 1 <= k <= candidates:
        raise ConfigError(f"k: is {k}; needs 1 to the number of candidates, {candidates}")


def block_intervals(totals: Array, counts: Array, resamples: int = RESAMPLES, seed: int = 0) -> list[Interval | None]:
    """Means over all things, and the percentiles of the same means over resampled blocks.

    Blocks are drawn with replacement, whole, as many as there are: their things depend on each other, so that
    resampling single ones would promise too much. All measures see the same draws.

    Args:
        totals: float64 [blocks, measures], the sum over the things of each block.
        counts: float64 [blocks, measures], how many there are; a block may have none.
        resamples: Draws.
        seed: Of the draws.

    Returns:
        For each measure the interval, with `problems` the number of blocks that have any thing of its kind, and
        without ends where that is one; None for a measure that nothing was counted for.

    Raises:
        DataError: The shapes differ, or there is no block.
    """
    if totals.shape != counts.shape or totals.ndim != 2 or not len(totals):
        raise DataError(f"totals: shape {totals.shape}, counts: {counts.shape}; need [blocks, measures], at least one")
    blocks = len(totals)
    random = np.random.default_rng(seed)
    found: list[Array] = []
    rows = max(1, BLOCK // blocks)
    for first in range(0, resamples, rows):
        drawn = random.integers(blocks, size=(min(rows, resamples - first), blocks))
        weight = np.stack([np.bincount(row, minlength=blocks) for row in drawn]).astype(np.float64)
        with np.errstate(invalid="ignore"):
            found.append((weight @ totals) / (weight @ counts))  # NaN where a draw has nothing of a kind
    means = np.concatenate(found)
    result: list[Interval | None] = []
    for place, count in enumerate(counts.sum(0)):
        filled = int((counts[:, place] > 0).sum())
        if not filled:
            result.append(None)
            continue
        mean = float(totals[:, place].sum() / count)
        if filled == 1:
            result.append(Interval(mean, None, None, 1))
            continue
        values = means[:, place][np.isfinite(means[:, place])]
        low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
        result.append(Interval(mean, low, high, filled))
    return result
