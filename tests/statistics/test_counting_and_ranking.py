"""pass@k and Best-of-k against every subset there is."""

from __future__ import annotations

from itertools import combinations, permutations
from math import inf, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quietstar.errors import ConfigError, DataError
from quietstar.statistics.candidates import pass_at_k
from quietstar.statistics.ranking import best_of_k


@st.composite
def scored(draw: st.DrawFn) -> tuple[list[int], list[bool], int]:
    """Few different scores, so that most examples have ties."""
    n = draw(st.integers(1, 7))
    scores = draw(st.lists(st.integers(-2, 2), min_size=n, max_size=n))
    return scores, draw(st.lists(st.booleans(), min_size=n, max_size=n)), draw(st.integers(1, n))


def share_of_subsets_with_one(correct: list[bool], k: int) -> float:
    return float(np.mean([any(subset) for subset in combinations(correct, k)]))


def mean_over_subsets(scores: list[int], correct: list[bool], k: int) -> float:
    """Takes the best of each subset, and one of several best with equal probability."""
    found = []
    for subset in combinations(range(len(scores)), k):
        top = max(scores[i] for i in subset)
        found.append(np.mean([correct[i] for i in subset if scores[i] == top]))
    return float(np.mean(found))


@given(scored())
def test_best_of_k_is_the_mean_over_all_subsets(example: tuple[list[int], list[bool], int]) -> None:
    assert best_of_k(*example) == pytest.approx(mean_over_subsets(*example), abs=1e-12)


def test_ties_are_the_expectation_over_all_ways_to_break_them() -> None:
    """Three candidates share the best score; every order of the five is one way to break the ties."""
    scores, correct = [2, 2, 1, 2, 1], [True, False, True, False, False]
    for k in range(1, 6):
        broken = []
        for order in permutations(range(5)):
            strict = [5 * score + order[i] for i, score in enumerate(scores)]  # orders the ties alone
            broken.append(best_of_k(strict, correct, k))
        assert best_of_k(scores, correct, k) == pytest.approx(np.mean(broken), abs=1e-12)


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_a_perfect_verifier_reaches_pass_at_k(correct: list[bool]) -> None:
    n, c = len(correct), sum(correct)
    for k in range(1, n + 1):
        assert best_of_k(correct, correct, k) == pytest.approx(pass_at_k(n, c, k), abs=1e-12)
        assert pass_at_k(n, c, k) == pytest.approx(share_of_subsets_with_one(correct, k), abs=1e-12)


def test_one_of_one_is_the_mean_accuracy_and_n_of_n_the_best_ranked() -> None:
    """The sum runs to i = N - k; without its last term the accuracy of these five would be 0.6."""
    scores, correct = [0.5, 0.1, 0.4, 0.3, 0.2], [True, True, True, False, True]
    assert best_of_k(scores, correct, 1) == pytest.approx(0.8)
    assert best_of_k(scores, correct, 5) == 1.0
    assert best_of_k(scores, [not right for right in correct], 5) == 0.0


def test_one_right_among_four_is_always_found_by_the_best_of_four() -> None:
    """Drawing with replacement would say 1 - (3/4)^4 = 0.684 of the same four candidates."""
    assert best_of_k([0.0, 1.0, 0.0, 0.0], [False, True, False, False], 4) == 1.0
    assert pass_at_k(4, 1, 4) == 1.0


def test_infinite_scores_are_ranked() -> None:
    assert best_of_k([-inf, 0.0, inf], [True, False, True], 2) == pytest.approx(2 / 3)


def test_pass_at_k_of_arrays_broadcasts() -> None:
    found = pass_at_k(10, np.array([[0], [3], [10]]), np.array([1, 5, 10]))
    assert found == pytest.approx(np.array([[0, 0, 0], [0.3, 1 - 21 / 252, 1], [1, 1, 1]]))
    assert pass_at_k([3, 4], [1, 1], 3) == pytest.approx([1.0, 0.75])


def test_large_numbers_do_not_overflow() -> None:
    """C(10000, 5000) has 3,008 digits."""
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)
    scores = np.arange(10_000)
    assert best_of_k(scores, scores == 9_999, 5_000) == pytest.approx(0.5)
    assert best_of_k(scores, scores >= 0, 64) == pytest.approx(1.0)


@settings(max_examples=20)
@given(scored())
def test_best_of_k_lies_below_pass_at_k(example: tuple[list[int], list[bool], int]) -> None:
    scores, correct, k = example
    assert best_of_k(scores, correct, k) <= pass_at_k(len(correct), sum(correct), k) + 1e-12


def test_impossible_arguments_are_named() -> None:
    for arguments, error, words in [
        (([1.0, nan], [True, False], 1), DataError, r"^scores: NaN at index 1"),
        (([1.0], [True, False], 1), DataError, "scores has 1, correct has 2"),
        (([1.0, 2.0], [True, 2], 1), DataError, "^correct: 2 at index 1"),
        (([1.0, 2.0], [True, 0.5], 1), DataError, "^correct: 0.5 at index 1; needs True or False"),
        (([1.0, "a"], [True, False], 1), DataError, "^scores: could not convert"),
        (([], [], 1), DataError, r"^scores: has the shape \[0\]"),
        (([1.0, 2.0], [True, False], 0), ConfigError, "^k: is 0; needs 1 to the number of candidates, 2"),
        (([1.0, 2.0], [True, False], 3), ConfigError, "^k: is 3"),
    ]:
        with pytest.raises(error, match=words):
            best_of_k(*arguments)
    for counts, error, words in [
        ((0, 0, 1), DataError, "^n: is 0"),
        ((4, 5, 1), DataError, "^c: is 5"),
        ((4, -1, 1), DataError, "^c: is -1"),
        ((4, 1, 5), ConfigError, "^k: is 5"),
        ((4, [0, 1], [1, 0]), ConfigError, "^k: is 0"),
        ((4, 0.5, 1), DataError, "^c: has the type float64"),
    ]:
        with pytest.raises(error, match=words):
            pass_at_k(*counts)
