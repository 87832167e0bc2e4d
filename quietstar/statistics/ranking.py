"""Measures of a verifier's ranking: Best-of-k, whether it tells right candidates from wrong ones, and calibration.

At the end, `compare_step_counts` compares the numbers of steps in rationales of a model and of humans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from quietstar.errors import ConfigError
from quietstar.statistics.intervals import Array, check_k, numbers, same_length, truths, within


def best_of_k(scores: ArrayLike, correct: ArrayLike, k: int) -> float:
    """Returns the probability that the best-scored of k candidates, drawn without replacement from N, is right. Exact.

    sum over i = 0 .. N - k of C(N - i - 1, k - 1) alpha_i / C(N, k), where alpha_i is 1 if the candidate at rank i is
    right, the best first (V-STaR, 2402.06457, Eq. 3; Eq. 2 of its first version). Candidates with equal scores are
    equally likely to be taken, so each counts with the mean of their alphas. k = 1 gives the mean accuracy, and a
    perfect verifier gives pass@k.

    Args:
        scores: [N], score of each candidate; higher is better, infinities are allowed.
        correct: [N], truth values: whether each candidate is right.
        k: Number of candidates drawn, 1 to N.

    Raises:
        DataError: A score is NaN, or the lengths differ.
        ConfigError: `k` is not in 1 to N.
    """
    ranked = ranked_correctness(scores, correct)
    check_k(k, len(ranked))
    return float(rank_weights(len(ranked), k) @ ranked)


def ranked_correctness(scores: ArrayLike, correct: ArrayLike) -> Array:
    """Returns whether each candidate is right, float64 [N], best score first; the mean over candidates of equal
    score.
    """
    scores, right = numbers("scores", scores), truths("correct", correct)
    same_length(scores=scores, correct=right)
    _, group, size = np.unique(-scores, return_inverse=True, return_counts=True)
    return np.repeat(np.bincount(group, weights=right) / size, size)


def rank_weights(candidates: int, k: int) -> Array:
    """Returns the probability that the candidate at each rank is the best of k, C(N - i - 1, k - 1) / C(N, k), float64
    [N].
    """
    i = np.arange(candidates - 1)
    return k / candidates * np.cumprod(np.concatenate(([1.0], (candidates - i - k) / (candidates - i - 1.0))))


@dataclass(frozen=True)
class Discrimination:
    """Areas under the ROC curve; None where all candidates are right or all are wrong.

    Args:
        pooled: AUROC over all candidates of all problems; it also rewards knowing which problems are easy.
        within: Mean AUROC over the problems that have both right and wrong candidates; choosing the best candidate
            needs this one.
        problems: Number of problems with both right and wrong candidates.
    """

    pooled: float | None
    within: float | None
    problems: int


@dataclass(frozen=True)
class Bin:
    """Candidates of similar probability.

    Args:
        low: Lower edge of the bin, inclusive.
        high: Upper edge of the bin, exclusive except for 1.
        candidates: Number of candidates in the bin.
        probability: Mean probability of the candidates.
        accuracy: Share of the candidates that is right.
    """

    low: float
    high: float
    candidates: int
    probability: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """How far predicted probabilities are from observed frequencies.

    Args:
        brier: Mean squared difference of probability and truth value.
        expected_calibration_error: Mean of |probability - accuracy| over the bins, weighted by their candidates.
        bins: Bins of the reliability diagram; empty ones are left out.
    """

    brier: float
    expected_calibration_error: float
    bins: tuple[Bin, ...]


def auroc(scores: ArrayLike, labels: ArrayLike) -> float | None:
    """Returns the probability that a right candidate is scored above a wrong one; a tie counts one half (Mann-Whitney
    U).

    Args:
        scores: [n], score of each candidate; higher is better.
        labels: [n], truth values: whether each candidate is right.

    Returns:
        0 to 1; None where all labels are the same.

    Raises:
        DataError: A score is NaN, or the lengths differ.
    """
    scores, right = numbers("scores", scores), truths("labels", labels)
    same_length(scores=scores, labels=right)
    positive = right.sum()
    pairs = positive * (len(right) - positive)
    if pairs == 0:
        return None
    return float((average_ranks(scores) @ right - positive * (positive + 1) / 2) / pairs)


def discrimination(scores: Sequence[ArrayLike], labels: Sequence[ArrayLike]) -> Discrimination:
    """Returns the pooled and the within-problem AUROC.

    Args:
        scores: Scores of each problem's candidates; higher is better.
        labels: Truth values of each problem's candidates: whether they are right.

    Raises:
        DataError: A score is NaN, or lengths differ.
    """
    same_length(scores=scores, labels=labels)
    each = [auroc(*problem) for problem in zip(scores, labels, strict=True)]
    told = [area for area in each if area is not None]
    pooled = auroc(np.concatenate([np.asarray(s) for s in scores]), np.concatenate([np.asarray(s) for s in labels]))
    return Discrimination(pooled, float(np.mean(told)) if told else None, len(told))


def calibration(probabilities: ArrayLike, labels: ArrayLike, bins: int = 10) -> Calibration:
    """Measures Brier score, expected calibration error and the reliability diagram, with bins of equal width.

    Args:
        probabilities: [n], predicted probability that each candidate is right, 0 to 1.
        labels: [n], truth values: whether each candidate is right.
        bins: Number of bins, at least 1.

    Raises:
        DataError: A probability is outside 0 to 1 or NaN, or the lengths differ.
        ConfigError: `bins` is less than 1.
    """
    if bins < 1:
        raise ConfigError(f"bins: is {bins}; needs at least 1")
    probability, right = within("probabilities", probabilities, 0, 1), truths("labels", labels)
    same_length(probabilities=probability, labels=right)
    edges = np.linspace(0, 1, bins + 1)
    place = np.searchsorted(edges[1:-1], probability, side="right")
    found = []
    for index in np.unique(place):
        inside = place == index
        means = float(probability[inside].mean()), float(right[inside].mean())
        found.append(Bin(float(edges[index]), float(edges[index + 1]), int(inside.sum()), *means))
    error = sum(bin.candidates * abs(bin.probability - bin.accuracy) for bin in found) / len(right)
    return Calibration(float(((probability - right) ** 2).mean()), error, tuple(found))


def average_ranks(values: Array) -> Array:
    """Returns ranks from 1, float64 [n]; equal values share their mean rank."""
    _, group, size = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(size) - (size - 1) / 2)[group])


@dataclass(frozen=True)
class StepCounts:
    """Numbers of steps of the model's rationales compared with the human-written ones.

    Args:
        problems: Number of problems with both rationales.
        model: Mean number of the model's steps.
        human: Mean number of steps of the human-written rationale.
        equal: Share of problems with equally many steps in both.
        fewer: Share of problems where the model takes fewer steps.
        pearson: Correlation; None where one of the two has the same number of steps everywhere.
        spearman: Correlation of the ranks, with mean ranks for equal numbers; None in the same case.
    """

    problems: int
    model: float
    human: float
    equal: float
    fewer: float
    pearson: float | None
    spearman: float | None


def compare_step_counts(model: ArrayLike, human: ArrayLike) -> StepCounts:
    """Makes the comparison of calculation steps that STaR (2203.14465, section 4) makes for GSM8K.

    Args:
        model: [problems], number of steps of the model's rationale.
        human: [problems], number of steps of the human-written rationale.

    Raises:
        DataError: The lengths differ, or a count is NaN.
    """
    model, human = numbers("model", model), numbers("human", human)
    same_length(model=model, human=human)
    return StepCounts(
        problems=len(model),
        model=float(model.mean()),
        human=float(human.mean()),
        equal=float((model == human).mean()),
        fewer=float((model < human).mean()),
        pearson=_correlation(model, human),
        spearman=_correlation(average_ranks(model), average_ranks(human)),
    )


def _correlation(first: Array, second: Array) -> float | None:
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])
