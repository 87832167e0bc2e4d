"""NLLs of a text with and without thoughts: their means, and where the gain is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quietstar.evaluation.arguments import Array
from quietstar.evaluation.blocks import block_intervals
from quietstar.evaluation.bootstrap import Interval
from quietstar.evaluation.comparison import Comparison, Group
from quietstar.evaluation.token_classes import CLASSES

Mask = NDArray[np.bool_]
DECILES = 10
DIFFICULTY, UNCERTAINTY, KIND = "difficulty", "uncertainty", "kind of token"
CAVEAT = (
    "Tenths of the tokens by their NLL without thinking, the easiest first: they look at the outcome. A change that is "
    "of no use, such as noise or predictions that are only sharper, already moves easy and hard tokens in opposite "
    "ways (regression to the mean), so that no tenth by itself says that thinking helps or hurts there; the mean over "
    "all does, and so do the tenths by uncertainty."
)


def nll_comparison(
    found: Sequence[tuple[Array, Array]],
    classes: Sequence[Sequence[str]],
    seed: int,
    entropies: Sequence[Array] | None = None,
) -> Comparison:
    """Per token, and by parts of the tokens; windows are resampled whole.

    The parts are tenths of the NLL without thought, tenths of that prediction's entropy, which does not look at the
    token that came, and kinds of token.

    Args:
        found: Of each window the NLLs without and with thought.
        classes: Of each window the class of each of these tokens.
        seed: Of the bootstrap.
        entropies: Of each window the entropies of the predictions without thought.

    Returns:
        Without `of` and `statement`, which are the caller's.
    """
    parts = [(DIFFICULTY, *part) for part in _tenths([off for off, _ in found])]
    parts += [(UNCERTAINTY, *part) for part in _tenths(entropies or [])]
    parts += [(KIND, kind, [np.array(own) == kind for own in classes]) for kind in CLASSES]
    everything = [np.ones(len(off), dtype=bool) for off, _ in found]
    masks = [np.stack(window) for window in zip(everything, *(mask for _, _, mask in parts), strict=True)]
    counts = np.stack([mask.sum(1) for mask in masks]).astype(np.float64)
    off = np.stack([mask @ side for mask, (side, _) in zip(masks, found, strict=True)])
    on = np.stack([mask @ side for mask, (_, side) in zip(masks, found, strict=True)])
    columns = [block_intervals(values, counts, seed=seed) for values in (off, on, on - off)]
    groups: dict[str, list[Group]] = {}
    for place, (kind, name, _) in enumerate(parts, start=1):
        three = [column[place] for column in columns]
        if all(three):
            groups.setdefault(kind, []).append(Group(name, int(counts[:, place].sum()), *_intervals(three)))
    return Comparison(
        "NLL",
        "",
        "",
        "nats",
        int(counts[:, 0].sum()),
        0,
        *_intervals([column[0] for column in columns]),
        higher_is_better=False,
        resampled="windows",
        groups=groups,
        caveats={DIFFICULTY: CAVEAT},
    )


def _tenths(values: Sequence[Array]) -> list[tuple[str, list[Mask]]]:
    """The name of each tenth, and of each window which tokens are in it."""
    if not values:
        return []
    edges = np.cumsum([len(own) for own in values])[:-1]
    ranked = np.split(deciles(np.concatenate(values)), edges)
    return [(f"tenth {place + 1}", [own == place for own in ranked]) for place in range(DECILES)]


def deciles(values: Array) -> NDArray[np.int64]:
    """Which tenth each number is in, 0 for the smallest; ties by place.

    Args:
        values: [n].
    """
    order = np.argsort(values, kind="stable")
    tenth = np.empty(len(order), dtype=np.int64)
    tenth[order] = np.arange(len(order)) * DECILES // len(order)
    return tenth


def bits_comparison(found: Sequence[tuple[Array, Array]], sizes: Sequence[int], seed: int) -> Comparison:
    """Bits per byte.

    Args:
        found: Of each window the NLLs without and with thought.
        sizes: Bytes of each window's predicted tokens.
        seed: Of the bootstrap.
    """
    counts = np.array(sizes, dtype=np.float64)[:, None]
    off = np.array([[side.sum() / math.log(2)] for side, _ in found])
    on = np.array([[side.sum() / math.log(2)] for _, side in found])
    three = [block_intervals(values, counts, seed=seed)[0] for values in (off, on, on - off)]
    total = int(counts.sum())
    return Comparison(
        "bits per byte",
        "",
        f"The same in bits for each of the {total:,} bytes of the text in UTF-8, so that tokenizers can be compared.",
        "bits",
        total,
        0,
        *_intervals(three),
        higher_is_better=False,
        resampled="windows",
    )


def _intervals(found: Sequence[Interval | None]) -> tuple[Interval, Interval, Interval]:
    off, on, difference = (one for one in found if one is not None)
    return off, on, difference
