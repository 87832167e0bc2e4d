"""The numbers behind a chart: curves, the points of a long curve that are drawn, and axes with their ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MOST_POINTS = 400
BUCKETS = 200
LARGEST, SMALLEST = 1e300, 1e-300
"""Bounds of the numbers that are drawn: ratios and differences of numbers beyond them leave the range of a float."""
TINY = 1e-250
"""Size below which a linear axis takes a number for 0."""
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


@dataclass(frozen=True)
class Series:
    """One curve.

    Args:
        name: Name of the curve in the legend.
        x: Horizontal positions of the points, float64 [n], ascending.
        y: Values at the points, float64 [n]; NaN leaves a gap.
        colour: Number of a colour in the palette, 1 to 6, or 7 for grey; it also decides the marker.
        faint: Whether the curve is thin, pale and without markers, for noisy measurements.
        dashed: Whether the line is dashed.
        spread: Half the height of a shaded band around `y`, float64 [n]; None without a band.
        band: Lower and upper end of a shaded band, float64 [n] each, used instead of `spread`; NaN where there is none.
    """

    name: str
    x: Floats
    y: Floats
    colour: int = 1
    faint: bool = False
    dashed: bool = False
    spread: Floats | None = None
    band: tuple[Floats, Floats] | None = None


def mean_curve(name: str, x: Sequence[float], runs: Sequence[Sequence[float]], **options: Any) -> Series:
    """Returns the mean curve of several runs, with a band from the lowest to the highest value.

    Args:
        name: Name of the curve in the legend.
        x: Horizontal positions of the points, [n], ascending.
        runs: Values of each run, [n] each; at least one run.
        options: Other arguments of `Series`, by name.
    """
    y = np.array(runs, float)
    band = (y.min(axis=0), y.max(axis=0)) if len(runs) > 1 else None
    return Series(name, np.array(x, float), y.mean(axis=0), band=band, **options)


@dataclass(frozen=True)
class Thinned:
    """At most `MOST_POINTS` points that represent a curve, each with the mean and the ends of its band, float64 [n]."""

    x: Floats
    y: Floats
    low: Floats
    high: Floats

    @property
    def has_band(self) -> bool:
        """Whether the band is wider than the line anywhere."""
        return bool(np.any(self.high > self.low))


def thin(series: Series) -> Thinned:
    """Returns the points of a curve to draw: all points of a short curve, intervals of a long one.

    There are up to `BUCKETS` equal intervals of x, each with the mean, the smallest and the largest value, so that no
    extreme is lost.
    """
    x, y = series.x, series.y
    spread = np.zeros_like(y) if series.spread is None else np.nan_to_num(series.spread)
    low, high = y - spread, y + spread
    if series.band is not None:
        low, high = (np.where(np.isfinite(end), end, y) for end in series.band)
    if len(x) <= MOST_POINTS:
        return Thinned(x, y, low, high)
    edges = np.linspace(x[0], x[-1], BUCKETS + 1)[:-1]
    starts = np.unique(np.searchsorted(x, edges))  # of the intervals that hold a point
    finite = np.isfinite(y)
    count = np.add.reduceat(finite.astype(np.float64), starts)
    total: Any = np.add.reduceat(np.where(finite, y, 0.0), starts)
    with np.errstate(invalid="ignore"):
        mean = np.where(count > 0, total / count, np.nan)
    return Thinned(x[starts], mean, np.fmin.reduceat(low, starts), np.fmax.reduceat(high, starts))


@dataclass(frozen=True)
class Scale:
    """An axis: maps numbers to positions from 0 (its start) to 1 (its end).

    Args:
        low: Number at the start of the axis.
        high: Number at the end of the axis, above `low`.
        ticks: Numbers that get a tick and a label, ascending.
        log: Whether the axis is logarithmic; all numbers are then above 0.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Returns the position of a number, 0 to 1 within the scale."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def labels(self) -> list[str]:
        """Returns a label for each tick, with enough digits to tell them apart."""
        labels = [number(tick) for tick in self.ticks]
        if self.log or len(self.ticks) < 2:
            return labels
        step = self.ticks[1] - self.ticks[0]
        largest = max(map(abs, self.ticks))
        if largest < 1e-3 or (largest >= 1000 and len(set(labels)) == len(labels)):
            return labels
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [f"{tick:,.{digits}f}".replace("-", MINUS) if tick else "0" for tick in self.ticks]


def linear_scale(low: float, high: float, ticks: int = 5, whole: bool = False) -> Scale:
    """Returns a linear scale that holds `low` and `high` and starts and ends at round numbers.

    Args:
        low: Smallest number to show.
        high: Largest number to show.
        ticks: Approximate number of ticks.
        whole: Whether ticks are whole numbers; the scale then starts and ends at `low` and `high`.
    """
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * size or size < TINY:
        margin = abs(low) * 0.1 if size >= TINY else 0.5
        low, high = (low - margin, high + margin) if not whole else (low - 1, high + 1)
    rough = (high - low) / ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
        first, last = math.ceil(low / step), math.floor(high / step)
        return Scale(low, high, tuple(step * index for index in range(first, last + 1)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Scale(first * step, last * step, tuple(step * index for index in range(first, last + 1)))


def log_scale(low: float, high: float) -> Scale:
    """Returns a logarithmic scale that holds `low` and `high`, both above 0."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if first == last:
        last += 1
    every = max(1, math.ceil((last - first) / 5))
    factors = (1, 2, 5) if last - first == 1 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last, every) for factor in factors]
    return Scale(10.0**first, 10.0**last, (*ticks, 10.0**last), log=True)


def number(value: float, digits: int = 4) -> str:
    """Returns a number for people to read: 1,234 or 12.3k, 0.0123, 1.2e-06; a NaN is a dash.

    Args:
        value: Number to write, finite or not.
        digits: Largest number of significant digits; numbers from 1,000 to 9,999 are whole.
    """
    if math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    size = abs(value)
    if size >= 10_000:
        for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if size >= factor:
                text = f"{value / factor:.{min(digits, 3)}g}{suffix}"
                break
    elif size >= 1000:
        text = f"{value:,.0f}"
    elif size == 0:
        text = "0"
    elif size < 1e-3:
        text = f"{value:.{min(digits, 3)}g}"
    else:
        text = f"{value:.{digits}g}"
    return MINUS + text[1:] if text.startswith("-") else text


def finite_range(values: Sequence[float], log: bool = False) -> tuple[float, float] | None:
    """Returns the smallest and the largest of the numbers that a scale can show; None if there are none."""
    shown = [value for value in values if abs(value) < LARGEST and (value > SMALLEST or not log)]
    return (min(shown), max(shown)) if shown else None
