"""Best-of-k: how often the candidate that a verifier ranks first among k is right."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from quietstar.evaluation.arguments import Array, check_k, numbers, same_length, truths


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
