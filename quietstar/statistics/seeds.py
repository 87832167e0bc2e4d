"""A mean and how far it can be trusted: Student's t interval of a few independent values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean; with a single value nothing is known of its spread.

    Args:
        mean: Of the values.
        standard_error: Of the mean, or None.
        low: Where the interval begins, or None.
        high: Where it ends, or None.
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
    """Mean, standard error and confidence interval.

    Args:
        values: At least one, independent.
        confidence: Share of such intervals that hold the true mean, where the values are normally distributed.
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
    """The t with |T| <= t in this share of draws of Student's distribution.

    Args:
        confidence: 0 to 1, exclusive.
        degrees_of_freedom: At least 1.
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
    """P(|T| <= sqrt(degrees_of_freedom) tan(angle)), whose series ends for whole degrees of freedom."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees_of_freedom % 2
    term, total = cosine if odd else 1.0, 0.0
    for k in range(odd, degrees_of_freedom - 1, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    return (angle + sine * total) * 2 / math.pi if odd else sine * total


def rounded(value: float) -> str:
    """A number with three decimals, and never -0.000."""
    return f"{round(value, 3) + 0.0:.3f}"  # adding zero turns "-0.000" into "0.000"
