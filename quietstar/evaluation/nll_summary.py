"""NLLs of a text with and without thoughts: their means, and where the gain is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from quietstar.evaluation.arguments import Array
from quietstar.evaluation.blocks import block_intervals
from quietstar.evaluation.bootstrap import Interval
from quietstar.evaluation.comparison import Comparison, Group
from quietstar.evaluation.token_classes import CLASSES

DECILES = 10


def nll_comparison(found: Sequence[tuple[Array, Array]], classes: Sequence[Sequence[str]], seed: int) -> Comparison:
    """Per token, and by tenths of the NLL without thought and by kind of token; windows are resampled whole.

    Args:
        found: Of each window the NLLs without and with thought.
        classes: Of each window the class of each of these tokens.
        seed: Of the bootstrap.

    Returns:
        Without `of` and `statement`, which are the caller's.
    """
    ranked = deciles(np.concatenate([off for off, _ in found]))
    edges = np.cumsum([len(off) for off, _ in found])[:-1]
    by_decile = np.split(ranked, edges)
    names = [f"tenth {place + 1}" for place in range(DECILES)]
    kinds = list(CLASSES)
    # one column for all tokens, one for each decile, one for each class
    masks = [
        np.stack(
            [
                np.ones(len(own), dtype=bool),
                *(tenth == place for place in range(DECILES)),
                *(np.array(own) == kind for kind in kinds),
            ]
        )
        for tenth, own in zip(by_decile, classes, strict=True)
    ]
    counts = np.stack([mask.sum(1) for mask in masks]).astype(np.float64)
    off = np.stack([mask @ side for mask, (side, _) in zip(masks, found, strict=True)])
    on = np.stack([mask @ side for mask, (_, side) in zip(masks, found, strict=True)])
    columns = [block_intervals(values, counts, seed=seed) for values in (off, on, on - off)]
    groups: list[Group] = []
    for place, name in enumerate(["all", *names, *kinds]):
        three = [column[place] for column in columns]
        if all(three):
            groups.append(Group(name, int(counts[:, place].sum()), *_intervals(three)))
    every = groups[0]
    return Comparison(
        "NLL",
        "",
        "",
        "nats",
        every.n,
        0,
        every.off,
        every.on,
        every.difference,
        higher_is_better=False,
        resampled="windows",
        groups={
            "difficulty": [group for group in groups if group.name in names],
            "kind of token": [group for group in groups if group.name in kinds],
        },
    )


def deciles(base_nll: Array) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Which tenth of the tokens each is in, 0 for the easiest: by its NLL without thought, ties by place.

    Args:
        base_nll: [n].
    """
    order = np.argsort(base_nll, kind="stable")
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
