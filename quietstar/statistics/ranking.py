"""Best-of-k: how often the candidate that a verifier ranks first among k is right.

Whether a verifier tells right candidates from wrong ones, and whether its probabilities mean what they say.

Whether a model takes as many steps as a human who solved the same problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from quietstar.errors import ConfigError
from quietstar.statistics.bootstrap import Array, check_k, numbers, same_length, truths, within


def best_of_k(scores: ArrayLike, correct: ArrayLike, k: int) -> float:
    """Probability that the best scored of k candidates, drawn without replacement from N, is right. Exact.

    sum over i = 0 .. N - k of C(N - i - 1, k - 1) alpha_i / C(N, k), where alpha_i says whether the candidate at rank i
    is right, the best first (V-STaR, 2402.06457, Eq. 3; Eq. 2 of its first version). Of candidates with equal scores
    each is as likely to be taken, so that each counts with their mean. k = 1 gives the mean accuracy, and a perfect
    verifier pass@k.

    Args:
        scores: [N], higher is better; infinities are fine.
        correct: [N], truth values.
        k: 1 to N.

    Raises:
        DataError: A score is NaN, or the lengths differ.
        ConfigError: `k` is not in 1 to N.
    """
    ranked = ranked_correctness(scores, correct)
    check_k(k, len(ranked))
    return float(rank_weights(len(ranked), k) @ ranked)


def ranked_correctness(scores: ArrayLike, correct: ArrayLike) -> Array:
    """float64 [N]: whether each candidate is right, the best scored first; the mean over those of equal score."""
    scores, right = numbers("scores", scores), truths("correct", correct)
    same_length(scores=scores, correct=right)
    _, group, size = np.unique(-scores, return_inverse=True, return_counts=True)
    return np.repeat(np.bincount(group, weights=right) / size, size)


def rank_weights(candidates: int, k: int) -> Array:
    """float64 [N]: how often the candidate at each rank is the best of k, C(N - i - 1, k - 1) / C(N, k)."""
    i = np.arange(candidates - 1)
    return k / candidates * np.cumprod(np.concatenate(([1.0], (candidates - i - k) / (candidates - i - 1.0))))


@dataclass(frozen=True)
class Discrimination:
    """Areas under the ROC curve; None where there is nothing to tell apart.

    Args:
        pooled: Over all candidates of all problems: it also rewards knowing which problems are easy.
        within: Mean over the problems that have both right and wrong candidates: what choosing the best one needs.
        problems: How many of these there are.
    """

    pooled: float | None
    within: float | None
    problems: int


@dataclass(frozen=True)
class Bin:
    """Candidates of about the same probability.

    Args:
        low: The bin's lower edge, which belongs to it.
        high: Its upper edge, which belongs to the next one, save 1.
        candidates: How many.
        probability: Their mean.
        accuracy: Share that is right.
    """

    low: float
    high: float
    candidates: int
    probability: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """How far probabilities are from frequencies.

    Args:
        brier: Mean squared difference of probability and truth.
        expected_calibration_error: |probability - accuracy| of the bins, weighted by their candidates.
        bins: The reliability diagram; empty bins are left out.
    """

    brier: float
    expected_calibration_error: float
    bins: tuple[Bin, ...]


def auroc(scores: ArrayLike, labels: ArrayLike) -> float | None:
    """Probability that a right candidate is scored above a wrong one, a tie counting one half (Mann-Whitney U).

    Args:
        scores: [n], higher is better.
        labels: [n], truth values.

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
    """The pooled and the within-problem AUROC.

    Args:
        scores: One list for each problem.
        labels: The same, truth values.

    Raises:
        DataError: As for `auroc`.
    """
    same_length(scores=scores, labels=labels)
    each = [auroc(*problem) for problem in zip(scores, labels, strict=True)]
    told = [area for area in each if area is not None]
    pooled = auroc(np.concatenate([np.asarray(s) for s in scores]), np.concatenate([np.asarray(s) for s in labels]))
    return Discrimination(pooled, float(np.mean(told)) if told else None, len(told))


def calibration(probabilities: ArrayLike, labels: ArrayLike, bins: int = 10) -> Calibration:
    """Brier score, expected calibration error and the reliability diagram, with bins of equal width.

    Args:
        probabilities: [n], 0 to 1, that a candidate is right.
        labels: [n], truth values.
        bins: At least 1.

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
    """Ranks from 1, float64 [n]; equal values share the mean of theirs."""
    _, group, size = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(size) - (size - 1) / 2)[group])


@dataclass(frozen=True)
class StepCounts:
    """Steps of the model's rationales against the human-written ones.

    Args:
        problems: How many have both.
        model: Mean steps of the model.
        human: Mean steps of the human.
        equal: Share of problems with as many steps in both.
        fewer: Share where the model takes fewer.
        pearson: Correlation, or None where one of the two always takes as many steps.
        spearman: Correlation of the ranks, equal ones sharing their mean, or None.
    """

    problems: int
    model: float
    human: float
    equal: float
    fewer: float
    pearson: float | None
    spearman: float | None


def compare_step_counts(model: ArrayLike, human: ArrayLike) -> StepCounts:
    """The comparison that STaR (2203.14465, section 4) makes for GSM8K's calculation steps.

    Args:
        model: [problems], steps of the model's rationale.
        human: [problems], of the human-written one.

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
