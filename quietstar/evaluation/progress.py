"""How an outer loop moves from iteration to iteration, told from its samples."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from quietstar.errors import DataError
from quietstar.evaluation.arguments import numbers, same_length, truths, within


@dataclass(frozen=True)
class Growth:
    """The set of solved problems of one iteration, against the one before.

    Args:
        newly_solved: Problems solved now and not the time before.
        lost: Solved the time before and not now.
        kept: Solved both times.
        ever: Solved in this or any earlier iteration.
    """

    newly_solved: int
    lost: int
    kept: int
    ever: int


@dataclass(frozen=True)
class Distinct:
    """Different right solutions of the problems that have any.

    Args:
        problems: How many have.
        mean: Different solutions of each of these; 0 where there is none.
        most: The same of the problem with the most.
    """

    problems: int
    mean: float
    most: int


@dataclass(frozen=True)
class GroupMeasures:
    """The samples of a group of problems, such as those of one number of digits.

    Args:
        samples: How many.
        acceptance: Share that is right.
        nats_per_token: Mean surprisal -log p of a sampled token, which estimates the entropy where sampling was at
            temperature 1 from all tokens. None where no token was sampled.
    """

    samples: int
    acceptance: float
    nats_per_token: float | None


def growth(solved: Sequence[Collection[str]]) -> list[Growth]:
    """How the solved set changes.

    Args:
        solved: For each iteration the ids of the problems it solves; before the first none is solved.
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
    """How many different right solutions problems have.

    Args:
        solutions: For each problem its right solutions, as texts that are equal where two solve it in the same way
            (`Task.solution_key`).
    """
    counts = [len(set(keys)) for keys in solutions.values() if keys]
    return Distinct(len(counts), sum(counts) / len(counts) if counts else 0.0, max(counts, default=0))


def truncation_rate(finish_reasons: Sequence[str]) -> float:
    """Share of the samples that were cut off: finish reason `length`; 0 where there is none."""
    return sum(reason == "length" for reason in finish_reasons) / max(1, len(finish_reasons))


def hinted_share(hinted: Sequence[bool]) -> float:
    """Share of the examples that were found with the answer as a hint; 0 where there is none."""
    return sum(map(bool, hinted)) / max(1, len(hinted))


def answer_entropy(answers: Sequence[str | None]) -> float:
    """Entropy of one problem's sampled answers in nats, 0 where all agree; None counts as an answer of its own."""
    if not answers:
        raise DataError("answers: is empty; needs at least one")
    shares = [count / len(answers) for count in Counter(answers).values()]
    return math.fsum(-share * math.log(share) for share in shares)


def by_group(
    groups: Sequence[str], correct: ArrayLike, logprobs: ArrayLike, tokens: ArrayLike
) -> dict[str, GroupMeasures]:
    """Acceptance and surprisal of each group of problems.

    Args:
        groups: [n], the group of each sample's problem.
        correct: [n], truth values.
        logprobs: [n], of each whole sample, in nats.
        tokens: [n], sampled tokens of each.

    Returns:
        By group, in sorted order.

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
