"""Intervals that say how reliable a mean is: percentile bootstrap intervals, and Student's t interval.

Bootstrap intervals over single problems come first, then the checks of arguments that all measures share, then
`block_intervals` for values that depend on each other within blocks, such as the tokens of a window, and last the mean
of a few independent values with Student's t interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quietstar.errors import ConfigError, DataError

Array = NDArray[np.float64]

RESAMPLES = 1000
CONFIDENCE = 0.95
BLOCK = 1 << 22
"""Numbers drawn at once, to limit the memory."""


@dataclass(frozen=True)
class Interval:
    """A mean over problems with its interval; a single problem gives no interval.

    Args:
        mean: Mean of the values.
        low: Lower end of the interval, or None.
        high: Upper end of the interval, or None.
        problems: Number of values, one for each problem.
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
    """Returns the mean of per-problem values, and percentiles of its resampled means.

    Where all values are equal, both ends equal the mean: these problems show no spread, which does not mean that there
    is none.

    Args:
        values: One finite value for each problem, [problems].
        resamples: Number of bootstrap draws, at least 1; each draws as many problems as there are, with replacement.
        seed: Seed of the bootstrap draws.
        confidence: Share of the resampled means within the interval, above 0 and below 1.

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
    """Returns the interval of the mean of `first` - `second`, with the errors of `bootstrap_interval`.

    Args:
        first: One finite value for each problem, [problems].
        second: Values of the same problems in the same order, [problems].
        resamples: Number of bootstrap draws, at least 1.
        seed: Seed of the bootstrap draws.
        confidence: Share of the resampled means within the interval, above 0 and below 1.
    """
    first, second = numbers("first", first), numbers("second", second)
    same_length(first=first, second=second)
    return bootstrap_interval(first - second, resamples, seed, confidence=confidence)


def bootstrap_intervals(
    values: Array, resamples: int = RESAMPLES, seed: int = 0, *, confidence: float = CONFIDENCE
) -> list[Interval]:
    """Returns the intervals of several measures, float64 [problems, measures]; all see the same draws of problems."""
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
    """Yields how many times each draw has each problem, float64 [some draws, problems]."""
    random = np.random.default_rng(seed)
    block = max(1, BLOCK // problems)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = random.integers(problems, size=(rows, problems)) + problems * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * problems).reshape(rows, problems).astype(np.float64)


def numbers(name: str, values: ArrayLike) -> Array:
    """Returns values as float64 [n].

    Raises:
        DataError: There is no value, there are several dimensions, or a value is not a number.
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
    """Returns numbers from `low` to `high`, such as truth values and probabilities, as float64 [n].

    Raises:
        DataError: A value lies outside, or `numbers` refuses the values.
    """
    array = numbers(name, values)
    outside = (array < low) | (array > high)
    if outside.any():
        index = int(outside.argmax())
        raise DataError(f"{name}: {array[index]:g} at index {index}; needs {low:g} to {high:g}")
    return array


def truths(name: str, values: ArrayLike) -> Array:
    """Returns truth values as 0.0 and 1.0, float64 [n].

    Raises:
        DataError: A value is neither.
    """
    array = within(name, values, 0, 1)
    if ((array != 0) & (array != 1)).any():
        index = int(((array != 0) & (array != 1)).argmax())
        raise DataError(f"{name}: {array[index]:g} at index {index}; needs True or False")
    return array


def same_length(**values: Sized) -> None:
    """Refuses arguments of unequal lengths.

    Raises:
        DataError: The lengths differ; the message names the arguments with their lengths.
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
    """Returns means over all things, and percentiles of the same means over resampled blocks.

    Whole blocks are drawn with replacement, as many as there are: the things of a block depend on each other, so that
    resampling single things would give intervals that are too narrow. All measures see the same draws.

    Args:
        totals: Sum over the things of each block, float64 [blocks, measures].
        counts: Number of things in each block, float64 [blocks, measures]; it may be 0.
        resamples: Number of bootstrap draws.
        seed: Seed of the bootstrap draws.

    Returns:
        The interval of each measure, with `problems` the number of blocks that have things of its kind, and without
        ends where that is one; None for a measure with no things.

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


@dataclass(frozen=True)
class Estimate:
    """A mean and its uncertainty; a single value gives no uncertainty.

    Args:
        mean: Mean of the values.
        standard_error: Standard error of the mean; None for a single value.
        low: Lower end of the confidence interval; None for a single value.
        high: Upper end of the confidence interval; None for a single value.
    """

    mean: float
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        shown = rounded(self.mean)
        if self.standard_error is None or self.low is None or self.high is None:
            return shown
        return f"{shown} ± {rounded(self.standard_error)} [{rounded(self.low)}, {rounded(self.high)}]"


def estimate(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Returns the mean, its standard error and its confidence interval.

    Args:
        values: Independent values, at least one.
        confidence: Share of all such intervals that contain the true mean, if the values are normally distributed.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Estimate(mean)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    error = math.sqrt(variance / count)
    reach = error * student_t_quantile(confidence, count - 1)
    return Estimate(mean, error, mean - reach, mean + reach)


def student_t_quantile(confidence: float, degrees_of_freedom: int) -> float:
    """Returns the t for which |T| <= t in this share of draws from Student's distribution.

    Args:
        confidence: Probability of |T| <= t, above 0 and below 1.
        degrees_of_freedom: Degrees of freedom of the distribution, at least 1.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):  # bisection, until the ends are neighbouring floats
        middle = (low + high) / 2
        if _central_probability(middle, degrees_of_freedom) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees_of_freedom) * math.tan(high)


def _central_probability(angle: float, degrees_of_freedom: int) -> float:
    """Returns P(|T| <= sqrt(degrees_of_freedom) tan(angle)), a series that is finite for whole degrees of freedom."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees_of_freedom % 2
    term, total = cosine if odd else 1.0, 0.0
    for k in range(odd, degrees_of_freedom - 1, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    return (angle + sine * total) * 2 / math.pi if odd else sine * total


def rounded(value: float) -> str:
    """Returns a number with three decimals, and never -0.000."""
    return f"{round(value, 3) + 0.0:.3f}"  # adding zero turns "-0.000" into "0.000"
