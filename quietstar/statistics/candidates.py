"""Several candidates for each of several problems, and the measures that need no ranking.

`pass_at_k`: how often at least one of k candidates is right. `majority_votes` and `weighted_vote_at_k`: how often the
answer with the most votes, or with the largest sum of a verifier's weights, among k candidates is right.

The rules of both votes:

- The k candidates are drawn without replacement from the problem's N.
- Answers are equal where their texts are; a candidate without an answer (None) has no vote, and a subset without any
  vote is wrong.
- A tie is not a majority: each of the leading answers is taken with equal probability.
- An answer is as right as its candidates are on average, should their verdicts differ.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quietstar.errors import ConfigError, DataError
from quietstar.statistics.intervals import Array, check_k, numbers, same_length, truths

Places = NDArray[np.int64]
Seed = int | tuple[int, ...]

SUBSETS = 1000
"""Subsets of k candidates that a weighted vote looks at; where there are no more than these, it is exact."""


@dataclass(frozen=True)
class Candidates:
    """The candidates of one problem.

    Args:
        problem: Id of the problem.
        answers: [N], final answer of each candidate; None where it has none.
        correct: [N], truth values: whether each candidate is right.
        scores: [N] scores of the candidates by the name of the scorer; higher is better.
    """

    problem: str
    answers: Sequence[str | None]
    correct: Sequence[bool]
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def check(self) -> None:
        """Refuses candidates that cannot be measured.

        Raises:
            DataError: There are no candidates, the lengths differ, or a score is NaN; the message names the problem.
        """
        try:
            truths("correct", self.correct)
            for name, values in self.scores.items():
                numbers(f"scores[{name}]", values)
            scores = {f"scores[{name}]": values for name, values in self.scores.items()}
            same_length(answers=self.answers, correct=self.correct, **scores)
        except DataError as error:
            raise DataError(f"problem {self.problem}: {error}") from None


def check_candidates(problems: Sequence[Candidates]) -> list[str]:
    """Checks the candidates of every problem, and that all problems have the same scores.

    Returns:
        The names of the scores.

    Raises:
        DataError: There is no problem, one has several entries, one has other scores than the first, or
            `Candidates.check` refuses one.
    """
    if not problems:
        raise DataError("problems: is empty; needs at least one")
    problem, entries = Counter(candidates.problem for candidates in problems).most_common(1)[0]
    if entries > 1:
        raise DataError(f"problem {problem}: has {entries} entries; needs one with all its candidates")
    names = list(problems[0].scores)
    for candidates in problems:
        candidates.check()
        if set(candidates.scores) != set(names):
            have, first = ", ".join(candidates.scores) or "none", ", ".join(names) or "none"
            raise DataError(f"problem {candidates.problem}: its scores are {have}; needs the first problem's, {first}")
    return names


@overload
def pass_at_k(n: int, c: int, k: int) -> float: ...
@overload
def pass_at_k(n: ArrayLike, c: ArrayLike, k: ArrayLike) -> float | Array: ...
def pass_at_k(n: ArrayLike, c: ArrayLike, k: ArrayLike) -> float | Array:
    """Returns the probability that k of n candidates, drawn without replacement, contain one of the c right ones.

    1 - C(n - c, k) / C(n, k) (Chen et al., 2107.03374, Eq. 1), as a product of k factors that cannot overflow.

    Args:
        n: Number of candidates, at least 1. `n`, `c` and `k` are whole numbers of any shapes that broadcast against
            each other.
        c: Number of right candidates, 0 to n.
        k: Number of candidates drawn, 1 to n.

    Returns:
        A float, or float64 of the broadcast shape.

    Raises:
        DataError: `n` or `c` is out of range, or one of the three is not a whole number.
        ConfigError: `k` is out of range.
    """
    total, right, drawn = np.broadcast_arrays(*(_whole(name, value) for name, value in (("n", n), ("c", c), ("k", k))))
    if (total < 1).any():
        raise DataError(f"n: is {total.min()}; needs at least one candidate")
    if ((right < 0) | (right > total)).any():
        raise DataError(f"c: is {right[(right < 0) | (right > total)][0]}; needs 0 to n")
    if ((drawn < 1) | (drawn > total)).any():
        raise ConfigError(f"k: is {drawn[(drawn < 1) | (drawn > total)][0]}; needs 1 to n")
    j = np.arange(drawn.max(initial=1))
    total, right, drawn = total[..., None], right[..., None], drawn[..., None]
    # factor j: the probability that candidate j + 1 is wrong, given that all before it are wrong
    wrong = np.clip(total - right - j, 0, None) / np.clip(total - j, 1, None)
    result = 1.0 - np.where(j < drawn, wrong, 1.0).prod(-1)
    return float(result) if result.ndim == 0 else result


def _whole(name: str, value: ArrayLike) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{name}: has the type {array.dtype}; needs whole numbers")
    return array.astype(np.int64)


def maj_at_k(answers: Sequence[str | None], correct: ArrayLike, k: int) -> float:
    """Returns the probability that a plurality vote of k candidates is right, exactly: see `majority_votes`."""
    return float(majority_votes(answers, correct, [k])[0])


def majority_votes(answers: Sequence[str | None], correct: ArrayLike, ks: Sequence[int]) -> Array:
    """Returns maj@k for several k at once.

    For each winning number of votes m it counts the subsets in which some answers have m votes and all others fewer: a
    polynomial in the size of the subset for each number of leading answers. An answer with n < m candidates cannot
    lead, so it adds no condition. All terms are positive, so that float64 loses no precision.

    Args:
        answers: [N], final answer of each candidate; None where it has none.
        correct: [N], truth values: whether each candidate is right.
        ks: Numbers of candidates drawn, each 1 to N.

    Returns:
        float64, one for each of `ks`.

    Raises:
        DataError: The lengths differ.
        ConfigError: A k is not in 1 to N, or there are more than 1e300 subsets, which needs N > 1000.
    """
    _, sizes, values = _groups(answers, correct)
    total, most = len(answers), max(ks, default=1)
    for k in ks:
        check_k(k, total)
    if math.comb(total, min(most, total // 2)) > 1e300:
        raise ConfigError(f"k: is {most} of {total} candidates, too many subsets to count; needs a smaller k")
    size_of_subset = np.arange(most + 1)
    gap = size_of_subset - size_of_subset[:, None]
    won = np.zeros(most + 1)
    for votes in range(1, min(most, max(sizes, default=0)) + 1):
        leaders = [(size, value) for size, value in zip(sizes, values, strict=True) if size >= votes]
        tied = np.arange(min(len(leaders), most // votes) + 1)
        # [leading answers, size of the subset]: how many subsets, and the same times the sum of the leaders' values
        ways, worth = np.zeros((2, len(tied), most + 1))
        ways[0] = _binomials(total - sum(size for size, _ in leaders), most)
        for size, value in leaders:
            choices = _binomials(size, most)
            fewer = np.where((gap >= 0) & (gap < votes), choices[gap.clip(0)], 0.0)
            lead, lead_worth = ways[:-1, :-votes] * choices[votes], worth[:-1, :-votes] * choices[votes]
            ways, worth = ways @ fewer, worth @ fewer
            ways[1:, votes:] += lead
            worth[1:, votes:] += lead_worth + value * lead
        won += (worth[1:] / tied[1:, None]).sum(0)
    return np.array([won[k] / math.comb(total, k) for k in ks])


def weighted_vote_at_k(
    answers: Sequence[str | None],
    weights: ArrayLike,
    correct: ArrayLike,
    k: int,
    *,
    logarithmic: bool = False,
    subsets: int = SUBSETS,
    seed: Seed = 0,
) -> float:
    """Returns the probability that the answer with the largest sum of weights among k candidates is right.

    Exact where there are at most `subsets` subsets; else the mean over `subsets` random ones. The same seed gives the
    same subsets for other weights, so that their votes can be compared. Sums that agree to 12 digits are a tie.

    Args:
        answers: [N], final answer of each candidate; None where it has none.
        weights: [N], weights of at least 0, such as a verifier's probabilities.
        correct: [N], truth values: whether each candidate is right.
        k: Number of candidates drawn, 1 to N.
        logarithmic: Whether the weights are logarithms, such as log-likelihoods; their exponentials are summed.
        subsets: Largest number of subsets to look at, at least 1.
        seed: Seed of the random subsets.

    Raises:
        DataError: The lengths differ, or a weight is NaN, infinite, or negative without `logarithmic`.
        ConfigError: `k` is not in 1 to N, or `subsets` is less than 1.
    """
    weight = numbers("weights", weights)
    group, sizes, values = _groups(answers, correct)
    same_length(answers=answers, weights=weight)
    check_k(k, len(answers))
    if subsets < 1:
        raise ConfigError(f"subsets: is {subsets}; needs at least 1")
    if (weight == np.inf).any() or (not logarithmic and (weight < 0).any()):
        found = f"are {weight.min():g} to {weight.max():g}"
        raise DataError(f"weights: {found}; need finite numbers of at least 0, or logarithms with logarithmic=True")
    if not sizes:
        return 0.0
    members = _subsets(len(answers), k, subsets, seed)
    votes, groups = weight[members], group[members]
    if logarithmic:  # scaled by each subset's largest weight: the vote is the same, and not all weights underflow
        top = np.where(groups < len(sizes), votes, -np.inf).max(1, keepdims=True)
        votes = np.exp(np.minimum(votes - np.where(np.isfinite(top), top, 0.0), 0.0))
    shape = len(members), len(sizes) + 1
    cells = (groups + shape[1] * np.arange(shape[0])[:, None]).ravel()
    counts = np.bincount(cells, minlength=math.prod(shape)).reshape(shape)[:, :-1]
    sums = np.bincount(cells, votes.ravel(), math.prod(shape)).reshape(shape)[:, :-1]
    # an answer of weight 0 may tie with another, an answer that the subset does not have never leads
    leads = (counts > 0) & (sums >= sums.max(1, keepdims=True) * (1 - 1e-12))
    return float((leads @ np.array(values) / leads.sum(1).clip(1)).mean())


def _groups(answers: Sequence[str | None], correct: ArrayLike) -> tuple[Places, list[int], list[float]]:
    """Returns which of the G answers each candidate gave, int64 [N], G for none; how many gave each; how right each
    is.
    """
    right = truths("correct", correct)
    same_length(answers=answers, correct=right)
    names = {name: place for place, name in enumerate(dict.fromkeys(name for name in answers if name is not None))}
    group = np.array([len(names) if answer is None else names[answer] for answer in answers])
    sizes = np.bincount(group, minlength=len(names) + 1)[:-1]
    values = np.bincount(group, right, len(names) + 1)[:-1] / sizes
    return group, sizes.tolist(), values.tolist()


def _binomials(n: int, most: int) -> Array:
    """Returns C(n, x) for x = 0 .. most, float64."""
    return np.array([math.comb(n, x) for x in range(most + 1)], dtype=np.float64)


def _subsets(candidates: int, k: int, most: int, seed: Seed) -> Places:
    """Returns the members of each subset, int64 [S, k]: all subsets where there are at most `most`, else random
    ones.
    """
    if math.comb(candidates, k) <= most:
        return np.array(list(combinations(range(candidates), k)))
    return _orders(candidates, most, seed)[:, :k]


@lru_cache(maxsize=1)  # a table asks for the same ones for each k and each score of a problem
def _orders(candidates: int, count: int, seed: Seed) -> Places:
    """Returns random orders of the candidates, int64 [count, N]."""
    return np.random.default_rng(seed).permuted(np.tile(np.arange(candidates), (count, 1)), axis=1)
