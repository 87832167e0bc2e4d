"""How an outer loop changes from iteration to iteration, measured on its samples, and signs that it makes its model
worse.

The measures come first. `held_out_falls` and `coverage_falls` then share one rule: iteration i is compared with the
earlier iteration in which the measure that must not fall was highest. It falls where the 95 % bootstrap interval of the
paired difference, i minus the earlier one, lies below 0. Chance alone rarely does that, and a single problem never.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from quietstar.errors import DataError
from quietstar.statistics.intervals import RESAMPLES, numbers, paired_difference, same_length, truths, within


@dataclass(frozen=True)
class Growth:
    """The set of solved problems of one iteration, compared with the iteration before.

    Args:
        newly_solved: Number of problems solved now and not in the iteration before.
        lost: Number of problems solved in the iteration before and not now.
        kept: Number of problems solved in both iterations.
        ever: Number of problems solved in this or any earlier iteration.
    """

    newly_solved: int
    lost: int
    kept: int
    ever: int


@dataclass(frozen=True)
class Distinct:
    """Different right solutions of the problems that have any.

    Args:
        problems: Number of problems with a right solution.
        mean: Mean number of different solutions of these problems; 0 where there is none.
        most: Number of different solutions of the problem with the most.
    """

    problems: int
    mean: float
    most: int


@dataclass(frozen=True)
class GroupMeasures:
    """The samples of a group of problems, such as those of one number of digits.

    Args:
        samples: Number of samples of the group.
        acceptance: Share of the samples that is right.
        nats_per_token: Mean surprisal -log p of a sampled token in nats; it estimates the entropy where sampling was at
            temperature 1 from all tokens. None where no token was sampled.
    """

    samples: int
    acceptance: float
    nats_per_token: float | None


def growth(solved: Sequence[Collection[str]]) -> list[Growth]:
    """Returns how the set of solved problems changes, for each iteration.

    Args:
        solved: Ids of the problems that each iteration solves; before the first iteration none is solved.
    """
    before: set[str] = set()
    ever: set[str] = set()
    found = []
    for ids in solved:
        now = set(ids)
        ever |= now
        found.append(Growth(len(now - before), len(before - now), len(now & before), len(ever)))
        before = now
    return found


def distinct_solutions(solutions: Mapping[str, Sequence[str]]) -> Distinct:
    """Counts the different right solutions of problems.

    Args:
        solutions: Right solutions by problem, as texts that are equal where two solve it in the same way
            (`Task.solution_key`).
    """
    counts = [len(set(keys)) for keys in solutions.values() if keys]
    return Distinct(len(counts), sum(counts) / len(counts) if counts else 0.0, max(counts, default=0))


def truncation_rate(finish_reasons: Sequence[str]) -> float:
    """Returns the share of the samples that were cut off, with finish reason `length`; 0 where there is none."""
    return sum(reason == "length" for reason in finish_reasons) / max(1, len(finish_reasons))


def hinted_share(hinted: Sequence[bool]) -> float:
    """Returns the share of the examples that were found with the answer as a hint; 0 where there is none."""
    return sum(map(bool, hinted)) / max(1, len(hinted))


def answer_entropy(answers: Sequence[str | None]) -> float:
    """Returns the entropy of one problem's sampled answers in nats, 0 where all agree; None counts as an answer.

    Raises:
        DataError: There are no answers.
    """
    if not answers:
        raise DataError("answers: is empty; needs at least one")
    shares = [count / len(answers) for count in Counter(answers).values()]
    return math.fsum(-share * math.log(share) for share in shares)


def by_group(
    groups: Sequence[str], correct: ArrayLike, logprobs: ArrayLike, tokens: ArrayLike
) -> dict[str, GroupMeasures]:
    """Measures acceptance and surprisal of each group of problems.

    Args:
        groups: [n], group of each sample's problem.
        correct: [n], truth values: whether each sample is right.
        logprobs: [n], log-probability of each whole sample in nats.
        tokens: [n], number of sampled tokens of each sample.

    Returns:
        The measures by group, in sorted order.

    Raises:
        DataError: The lengths differ, or a value is impossible.
    """
    right, nats = truths("correct", correct), numbers("logprobs", logprobs)
    lengths = within("tokens", tokens, 0, np.inf)
    same_length(groups=groups, correct=right, logprobs=nats, tokens=lengths)
    places = defaultdict(list)
    for place, group in enumerate(groups):
        places[group].append(place)
    found = {}
    for group, rows in sorted(places.items()):
        written = lengths[rows].sum()
        surprisal = float(-nats[rows].sum() / written) if written else None
        found[group] = GroupMeasures(len(rows), float(right[rows].mean()), surprisal)
    return found


@dataclass(frozen=True)
class Regression:
    """An iteration that is worse than an earlier one.

    Args:
        iteration: Number of the iteration, counted from 0 in the order given.
        since: Number of the earlier iteration.
        message: Sentence that says what fell and what rose, with numbers.
    """

    iteration: int
    since: int
    message: str


def held_out_falls(
    training: Sequence[float], held_out: Sequence[ArrayLike], *, resamples: int = RESAMPLES, seed: int = 0
) -> list[Regression]:
    """Finds iterations in which the held-out accuracy falls while the accuracy on the training problems rises.

    Args:
        training: [iterations], mean accuracy on the training problems. Any rise counts, because each iteration may draw
            other problems.
        held_out: [problems] for each iteration, correctness on the same problems in the same order.
        resamples: Number of bootstrap draws.
        seed: Seed of the bootstrap draws.

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
    """Finds iterations in which pass@k falls while pass@1 rises: the model writes what it knows more often, and knows
    less.

    pass@1 rises where the interval of its paired difference lies above 0.

    Args:
        pass_at_1: [problems] for each iteration, pass@1 of the same problems in the same order.
        pass_at_k: [problems] for each iteration, pass@k of the same problems in the same order.
        k: Number of candidates drawn, for the message.
        resamples: Number of bootstrap draws.
        seed: Seed of the bootstrap draws.

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
