"""Signs that an outer loop makes its model worse.

The rule of both: iteration i is compared with the earlier one in which the measure that must not fall was highest. It
falls where the 95 % bootstrap interval of the paired difference, i minus that one, lies below 0: chance alone rarely
does that, and one problem alone never.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from numpy.typing import ArrayLike

from quietstar.evaluation.arguments import numbers, same_length
from quietstar.evaluation.bootstrap import RESAMPLES, paired_difference


@dataclass(frozen=True)
class Regression:
    """An iteration that is worse than an earlier one.

    Args:
        iteration: Counted from 0, as they were given.
        since: The earlier one.
        message: What fell and what rose, with numbers.
    """

    iteration: int
    since: int
    message: str


def held_out_falls(
    training: Sequence[float], held_out: Sequence[ArrayLike], *, resamples: int = RESAMPLES, seed: int = 0
) -> list[Regression]:
    """Iterations whose held-out accuracy falls while the accuracy on the training problems rises.

    Args:
        training: [iterations], mean accuracy on the training problems. Any rise counts: each iteration may draw others.
        held_out: For each iteration [problems], the same ones in the same order.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        DataError: The lengths differ, or a value is NaN.
    """
    same_length(training=training, held_out=held_out)

    def rises(now: int, since: int) -> str | None:
        if training[now] <= training[since]:
            return None
        return f"training accuracy rises from {training[since]:.1%} to {training[now]:.1%}"

    return _regressions("held-out accuracy", held_out, rises, resamples, seed)


def coverage_falls(
    pass_at_1: Sequence[ArrayLike],
    pass_at_k: Sequence[ArrayLike],
    k: int,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Regression]:
    """Iterations whose pass@k falls while pass@1 rises: the model writes what it knows more often, and knows less.

    pass@1 rises where the interval of its paired difference lies above 0.

    Args:
        pass_at_1: For each iteration [problems], the same ones in the same order.
        pass_at_k: The same.
        k: For the message.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        DataError: The lengths differ, or a value is NaN.
    """
    same_length(pass_at_1=pass_at_1, pass_at_k=pass_at_k)

    once = [numbers(f"pass@1 of iteration {place}", values) for place, values in enumerate(pass_at_1)]

    def rises(now: int, since: int) -> str | None:
        change = paired_difference(once[now], once[since], resamples, seed)
        if not change.above_zero:
            return None
        return f"pass@1 rises from {once[since].mean():.1%} to {once[now].mean():.1%} (difference {change})"

    return _regressions(f"pass@{k}", pass_at_k, rises, resamples, seed)


def _regressions(
    falling: str,
    values: Sequence[ArrayLike],
    rises: Callable[[int, int], str | None],
    resamples: int,
    seed: int,
) -> list[Regression]:
    means = [float(numbers(f"{falling} of iteration {place}", value).mean()) for place, value in enumerate(values)]
    found = []
    for now in range(1, len(values)):
        since = max(range(now), key=means.__getitem__)
        change = paired_difference(values[now], values[since], resamples, seed)
        if change.below_zero and (risen := rises(now, since)):
            fallen = f"{falling} falls from {means[since]:.1%} to {means[now]:.1%} (difference {change})"
            message = f"iteration {now}, against {since}: {fallen} while {risen}"
            found.append(Regression(now, since, message))
    return found
