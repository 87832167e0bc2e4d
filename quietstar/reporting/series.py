"""A curve's points, and what of them is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
MOST_POINTS = 400
BUCKETS = 200


@dataclass(frozen=True)
class Series:
    """One curve.

    Args:
        name: For the legend.
        x: [n], ascending.
        y: [n]; NaN leaves a gap.
        colour: 1 to 6 of the palette.
        faint: Drawn thin and behind, for curves that are noisy by nature.
        dashed: Drawn with dashes.
        spread: [n] or None: a band of y - spread to y + spread is shaded.
        band: Both ends of the band, [n] each, instead; NaN where there is none.
    """

    name: str
    x: Floats
    y: Floats
    colour: int = 1
    faint: bool = False
    dashed: bool = False
    spread: Floats | None = None
    band: tuple[Floats, Floats] | None = None


@dataclass(frozen=True)
class Thinned:
    """At most `MOST_POINTS` points that stand for a curve: mean, smallest and largest of each."""

    x: Floats
    y: Floats
    low: Floats
    high: Floats

    @property
    def has_band(self) -> bool:
        """Whether a band has anything to show."""
        return bool(np.any(self.high > self.low))


def thin(series: Series) -> Thinned:
    """A curve as it is where it is short; otherwise equal stretches of x, so that no extreme is lost."""
    x, y = series.x, series.y
    spread = np.zeros_like(y) if series.spread is None else np.nan_to_num(series.spread)
    low, high = y - spread, y + spread
    if series.band is not None:
        low, high = (np.where(np.isfinite(end), end, y) for end in series.band)
    if len(x) <= MOST_POINTS:
        return Thinned(x, y, low, high)
    edges = np.linspace(x[0], x[-1], BUCKETS + 1)[:-1]
    starts = np.unique(np.searchsorted(x, edges))  # of the stretches that hold a point
    finite = np.isfinite(y)
    count = np.add.reduceat(finite.astype(np.float64), starts)
    total: Any = np.add.reduceat(np.where(finite, y, 0.0), starts)
    with np.errstate(invalid="ignore"):
        mean = np.where(count > 0, total / count, np.nan)
    return Thinned(x[starts], mean, np.fmin.reduceat(low, starts), np.fmax.reduceat(high, starts))
