"""One measure with and without thinking, on the same items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from quietstar.statistics.intervals import Interval, bootstrap_interval, paired_difference

SIDES = ("off", "on")


@dataclass(frozen=True)
class Comparison:
    """A metric without and with thinking on the same items.

    Args:
        metric: Name of the metric.
        of: Name of the task or file.
        statement: One sentence that says what the metric is.
        unit: Unit of the numbers; `share` for 0 to 1.
        n: Number of items compared.
        skipped: Number of items that are left out everywhere.
        off: Mean without thinking, with its 95 % interval.
        on: Mean with thinking, with its 95 % interval.
        difference: Paired difference on - off over the same items.
        higher_is_better: Whether a higher value is better; None where neither is known to be.
        skipped_because: Reason why items are skipped.
        resampled: What the bootstrap draws with replacement, such as problems.
        seconds: Wall time in seconds by side (`off`, `on`), where the sides are timed separately.
        generated: Numbers on the generated texts by side, where texts are generated: `tokens`, `tokens_per_second`, and
            `thought_at`, the share of the tokens that the model thought at.
        groups: Comparisons within parts of the items, by kind of group.
        caveats: Reason why single differences mean nothing alone, by the kinds of group that this holds for.
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
        """Returns the comparison as dicts, lists, strings, numbers and None."""
        return asdict(self)


@dataclass(frozen=True)
class Group:
    """The comparison within a part of the items.

    Args:
        name: Name of the part.
        n: Number of items in the part.
        off: Mean without thinking, with its 95 % interval.
        on: Mean with thinking, with its 95 % interval.
        difference: Paired difference on - off, with its 95 % interval.
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
    """Compares one number per item and side; the bootstrap resamples items.

    Args:
        metric, of, statement, unit, skipped, seconds, generated: Fields of the `Comparison`.
        off: [n], value of each item without thinking.
        on: [n], value of each of the same items with thinking.
        seed: Seed of the bootstrap draws.
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
