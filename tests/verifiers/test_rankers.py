"""Votes count what they say, and ties are settled as stated."""

from __future__ import annotations

import math

import pytest

from quietstar.errors import ConfigError, DataError
from quietstar.verifiers.ranking import count_votes, rank, vote_weights

ANSWERS = ["7", "8", None, "7", "9"]
SCORES = [-3.0, -2.0, -0.5, -4.0, -1.0]


def test_by_score_the_highest_comes_first_and_equal_ones_stay_in_order() -> None:
    assert rank("score", scores=SCORES) == [2, 4, 1, 0, 3]
    assert rank("score", scores=[1.0, 2.0, 1.0]) == [1, 0, 2]


def test_a_majority_is_counted_without_those_that_have_no_answer() -> None:
    assert count_votes([None, None, "a"]) == {"a": 1.0}
    assert rank("majority", answers=ANSWERS) == [0, 3, 1, 4, 2]
    assert rank("majority", answers=[None, None, "a"]) == [2, 0, 1]


def test_answers_with_equal_votes_are_in_the_order_of_their_best_scores() -> None:
    assert rank("majority", answers=ANSWERS, scores=SCORES) == [0, 3, 4, 1, 2]
    assert rank("majority", answers=["a", "b", "b", "a"], scores=[0.1, 0.2, 0.9, 0.3]) == [2, 1, 3, 0]


def test_weights_can_outvote_a_majority() -> None:
    weights = vote_weights(SCORES, logarithmic=True)
    assert sum(weights) == pytest.approx(1)
    assert weights[1] / weights[0] == pytest.approx(math.e)
    assert rank("weighted", answers=ANSWERS, scores=SCORES, weights=weights) == [4, 1, 0, 3, 2]
    assert vote_weights([0.3, -0.1, 1.2], logarithmic=False) == [0.3, 0.0, 1.2]
    assert vote_weights([-1e5, -1e5 - 800], logarithmic=True) == [1.0, 0.0]  # far below what exp can hold


def test_what_is_missing_or_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match="answers: missing; ranking by majority"):
        rank("majority", scores=SCORES)
    with pytest.raises(DataError, match="got 5 scores, 2 answers"):
        rank("majority", scores=SCORES, answers=["7", "8"])
