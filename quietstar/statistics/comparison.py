"""One measure with and without thinking, on the same items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from quietstar.statistics.bootstrap import Interval, bootstrap_interval, paired_difference

SIDES = ("off", "on")


@dataclass(frozen=True)
class Comparison:
    """What a metric has found.

    Args:
        metric: Its name.
        of: The task or file.
        statement: One sentence on what it is.
        unit: `share` (0 to 1), or what the numbers are counted in.
        n: Items.
        skipped: Items that are counted nowhere.
        off: Without thinking, with its 95 % interval.
        on: With thinking.
        difference: on - off of the same items, paired.
        higher_is_better: Or lower; None: neither is known to be.
        skipped_because: What is wrong with those that are skipped.
        resampled: What the bootstrap draws with replacement.
        seconds: Of each side, where they are measured apart.
        generated: Of each side, where texts are generated: their `tokens`, `tokens_per_second`, and `thought_at`, the
            share of the tokens that the model thought at.
        groups: The same difference within parts of the items, by kind of group.
        caveats: Of kinds of groups whose single differences say nothing by themselves: why.
    """

    metric: str
    of: str
    statement: str
    unit: str
    n: int
    skipped: int
    off: Interval
    on: Interval
    difference: Interval
    higher_is_better: bool | None = True
    skipped_because: str = "too long for the model's context"
    resampled: str = "problems"
    seconds: Mapping[str, float] = field(default_factory=dict)
    generated: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    groups: Mapping[str, Sequence[Group]] = field(default_factory=dict)
    caveats: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Dicts, lists, strings, numbers and None."""
        return asdict(self)


@dataclass(frozen=True)
class Group:
    """A part of the items.

    Args:
        name: Of the part.
        n: Items in it.
        off: Mean without thinking.
        on: Mean with thinking.
        difference: on - off.
    """

    name: str
    n: int
    off: Interval
    on: Interval
    difference: Interval


def compare(
    metric: str,
    of: str,
    statement: str,
    off: Sequence[float],
    on: Sequence[float],
    *,
    skipped: int,
    seed: int,
    unit: str = "share",
    seconds: Mapping[str, float] | None = None,
    generated: Mapping[str, Mapping[str, float]] | None = None,
) -> Comparison:
    """A comparison of one number per item and side, resampled by items.

    Args:
        metric, of, statement, unit, skipped, seconds, generated: As in `Comparison`.
        off: [n].
        on: [n], of the same items.
        seed: Of the bootstrap.
    """
    return Comparison(
        metric,
        of,
        statement,
        unit,
        len(off),
        skipped,
        bootstrap_interval(off, seed=seed),
        bootstrap_interval(on, seed=seed),
        paired_difference(on, off, seed=seed),
        seconds=seconds or {},
        generated=generated or {},
    )
