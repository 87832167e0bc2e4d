"""Intervals of means over things that come in blocks, such as the tokens of a window, which depend on each other."""

from __future__ import annotations

import numpy as np

from quietstar.errors import DataError
from quietstar.evaluation.arguments import Array
from quietstar.evaluation.bootstrap import BLOCK, CONFIDENCE, RESAMPLES, Interval


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
