"""Votes against every subset there is."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from math import comb, inf, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quietstar.errors import ConfigError, DataError
from quietstar.statistics.candidates import maj_at_k, majority_votes, weighted_vote_at_k

Example = tuple[list[str | None], list[int], list[bool], int]


@st.composite
def voted(draw: st.DrawFn) -> Example:
    """Few answers, small whole weights: ties of votes and of sums are common."""
    n = draw(st.integers(1, 7))
    answers = draw(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=n, max_size=n))
    weights = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    right = draw(st.sets(st.sampled_from("abc")))
    return answers, weights, [answer in right for answer in answers], draw(st.integers(1, n))


def brute_force(answers: list[str | None], weights: list[int], correct: list[bool], k: int) -> float:
    """Counts each subset by the rules of the module, answer by answer."""
    found = []
    for subset in combinations(range(len(answers)), k):
        sums: dict[str, int] = {}
        for i in subset:
            if answers[i] is not None:
                sums[answers[i]] = sums.get(answers[i], 0) + weights[i]
        leaders = [answer for answer, total in sums.items() if total == max(sums.values())]
        found.append(np.mean([correct[answers.index(answer)] for answer in leaders]) if leaders else 0.0)
    return float(np.mean(found))


@given(voted())
def test_majority_is_the_mean_over_all_subsets(example: Example) -> None:
    answers, _, correct, k = example
    assert maj_at_k(answers, correct, k) == pytest.approx(brute_force(answers, [1] * 7, correct, k), abs=1e-12)


@given(voted())
def test_weighted_vote_is_the_mean_over_all_subsets(example: Example) -> None:
    answers, weights, correct, k = example
    assert weighted_vote_at_k(answers, weights, correct, k) == pytest.approx(brute_force(*example), abs=1e-12)
    with np.errstate(divide="ignore"):
        logs = np.log(weights)
    if all(weights):  # of a subset of weights that are all zero nothing but a tie remains: the next test
        found = weighted_vote_at_k(answers, logs, correct, k, logarithmic=True)
        assert found == pytest.approx(brute_force(*example), abs=1e-12)


def test_zero_weights_tie() -> None:
    answers, correct = ["a", "b", None], [True, False, False]
    assert weighted_vote_at_k(answers, [0.0, 0.0, 5.0], correct, 3) == 0.5
    assert weighted_vote_at_k(answers, [-inf, -inf, 5.0], correct, 3, logarithmic=True) == 0.5


def test_many_votes_are_counted_as_exactly_as_few() -> None:
    """128 candidates, two answers of 70 and 58: a hypergeometric sum in whole numbers, the tie shared."""
    answers, correct = ["yes"] * 70 + ["no"] * 58, [True] * 70 + [False] * 58
    for k in (1, 2, 31, 64, 128):
        ways = {yes: comb(70, yes) * comb(58, k - yes) for yes in range(k + 1)}
        won = sum(count for yes, count in ways.items() if 2 * yes > k) + Fraction(ways.get(k / 2, 0), 2)
        assert maj_at_k(answers, correct, k) == pytest.approx(float(won / comb(128, k)), rel=1e-12)


def test_many_different_answers_are_counted_exactly() -> None:
    """With 16 answers of 8 each, one of them right, it wins one vote in 16, whatever the ties."""
    answers = [f"{i % 16}" for i in range(128)]
    correct = [answer == "3" for answer in answers]
    assert majority_votes(answers, correct, [1, 2, 7, 64, 128]) == pytest.approx([1 / 16] * 5, rel=1e-12)


def test_silent_candidates_take_places_but_no_votes() -> None:
    """One right answer, three candidates without one: it wins wherever it is drawn."""
    answers = ["7", None, None, None]
    correct = [True, False, False, False]
    assert majority_votes(answers, correct, [1, 2, 4]) == pytest.approx([0.25, 0.5, 1.0])
    assert majority_votes([None, None], [False, False], [1, 2]).tolist() == [0.0, 0.0]
    assert weighted_vote_at_k([None, None], [1.0, 1.0], [False, False], 1) == 0.0


def test_an_answer_with_two_verdicts_counts_with_their_mean() -> None:
    assert majority_votes(["x", "x", "y"], [True, False, False], [1, 3]) == pytest.approx([1 / 3, 0.5])


def test_one_vote_of_one_is_the_accuracy_whatever_its_weight() -> None:
    answers, correct = list("abca"), [True, False, False, True]
    assert maj_at_k(answers, correct, 1) == weighted_vote_at_k(answers, [3, 1, 2, 5], correct, 1) == 0.5


def test_sums_in_another_order_still_tie() -> None:
    """0.1 + 0.2 is not 0.3 in binary."""
    assert weighted_vote_at_k(list("aab"), [0.1, 0.2, 0.3], [True, True, False], 3) == 0.5


def test_log_likelihoods_of_long_texts_do_not_underflow() -> None:
    """exp(-2000) is 0 in float64; three times it is still more than it once."""
    answers, correct = ["a", "b", "b", "b"], [False, True, True, True]
    assert weighted_vote_at_k(answers, [-1999.5, -2000, -2000, -2000], correct, 4, logarithmic=True) == 1.0
    assert weighted_vote_at_k(answers, [-1998.0, -2000, -2000, -2000], correct, 4, logarithmic=True) == 0.0


def test_sampled_subsets_are_close_to_all_of_them_and_seeded() -> None:
    """C(16, 8) = 12,870 subsets against 2,000: the error is at most 0.5 / sqrt(2000) = 0.011."""
    random = np.random.default_rng(0)
    answers = [str(answer) for answer in random.integers(3, size=16)]
    weights, correct = random.random(16), [answer == "1" for answer in answers]
    exact = weighted_vote_at_k(answers, weights, correct, 8, subsets=12_870)
    drawn = [weighted_vote_at_k(answers, weights, correct, 8, subsets=2_000, seed=seed) for seed in (1, 1, 2)]
    assert 0.1 < exact < 0.9
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn == pytest.approx([exact] * 3, abs=4 * 0.011)


@settings(max_examples=20)
@given(voted())
def test_equal_weights_are_a_majority_vote(example: Example) -> None:
    answers, _, correct, k = example
    vote = weighted_vote_at_k(answers, [0.25] * len(answers), correct, k)
    assert vote == pytest.approx(maj_at_k(answers, correct, k), abs=1e-12)


def test_a_thousand_candidates_are_within_the_range_of_floats() -> None:
    """Of 1,000 answers 10 agree, all others differ: C(1000, 100) has 140 digits. Two that agree lead alone."""
    answers = ["right"] * 10 + [f"{i}" for i in range(990)]
    found = maj_at_k(answers, [answer == "right" for answer in answers], 100)
    none, one = comb(990, 100), 10 * comb(990, 99)
    won = comb(1000, 100) - none - one + Fraction(one, 100)
    assert found == pytest.approx(float(won / comb(1000, 100)), rel=1e-12)


def test_impossible_arguments_are_named() -> None:
    answers, correct = ["a", None], [True, False]
    with pytest.raises(ConfigError, match=r"^k: is 3; needs 1 to the number of candidates, 2"):
        maj_at_k(answers, correct, 3)
    with pytest.raises(DataError, match="answers has 2, correct has 1"):
        maj_at_k(answers, [True], 1)
    with pytest.raises(ConfigError, match=r"^k: is 2000 of 3000 candidates, too many subsets"):
        maj_at_k(["a"] * 3000, [True] * 3000, 2000)
    for weights, options, error, words in [
        ([1.0, nan], {}, DataError, "^weights: NaN at index 1"),
        ([1.0, -0.5], {}, DataError, "^weights: are -0.5 to 1"),
        ([1.0, inf], {"logarithmic": True}, DataError, "^weights: are 1 to inf"),
        ([1.0], {}, DataError, "answers has 2, weights has 1"),
        ([1.0, 1.0], {"subsets": 0}, ConfigError, "^subsets: is 0"),
    ]:
        with pytest.raises(error, match=words):
            weighted_vote_at_k(answers, weights, correct, 1, **options)
