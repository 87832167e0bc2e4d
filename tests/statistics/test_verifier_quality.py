"""AUROC against all pairs, calibration and the bootstrap against cases worked out by hand."""

from __future__ import annotations

from math import nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quietstar.errors import ConfigError, DataError
from quietstar.statistics.intervals import bootstrap_interval, bootstrap_intervals, paired_difference
from quietstar.statistics.ranking import auroc, calibration, compare_step_counts, discrimination


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=12))
def test_auroc_is_the_share_of_pairs_in_order(samples: list[tuple[int, bool]]) -> None:
    scores, labels = [score for score, _ in samples], [label for _, label in samples]
    right = [score for score, label in samples if label]
    wrong = [score for score, label in samples if not label]
    pairs = [(a > b) + (a == b) / 2 for a in right for b in wrong]
    found = auroc(scores, labels)
    assert found == (pytest.approx(np.mean(pairs)) if pairs else None)


def test_within_problems_an_easy_problem_says_nothing() -> None:
    """The score knows which problem is easy and nothing of its candidates: pooled it looks good."""
    scores = [[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.5, 0.5]]
    labels = [[True, True, True, False], [True, False, False, False], [True, True]]
    found = discrimination(scores, labels)
    assert found.pooled == pytest.approx((3 * 3.5 + 1.5 + 2 * 3) / 24)  # right ones of score 1, 0 and 0.5
    assert (found.within, found.problems) == (0.5, 2)


def test_without_a_wrong_candidate_there_is_nothing_to_tell_apart() -> None:
    found = discrimination([[0.1, 0.2]], [[True, True]])
    assert (found.pooled, found.within, found.problems) == (None, None, 0)


def test_calibration_worked_out_by_hand() -> None:
    found = calibration([0.0, 0.1, 0.5, 0.9, 1.0], [False, True, True, True, False], bins=2)
    assert found.brier == pytest.approx((0 + 0.81 + 0.25 + 0.01 + 1) / 5)
    low, high = found.bins
    assert (low.low, low.high, low.candidates, low.accuracy) == (0.0, 0.5, 2, 0.5)
    assert (high.candidates, high.probability, high.accuracy) == (3, pytest.approx(0.8), pytest.approx(2 / 3))
    assert found.expected_calibration_error == pytest.approx((2 * 0.45 + 3 * (0.8 - 2 / 3)) / 5)


def test_frequencies_are_calibrated_and_empty_bins_left_out() -> None:
    found = calibration([0.25] * 4 + [1.0] * 2, [True, False, False, False, True, True])
    assert found.expected_calibration_error == 0
    assert [(bin.low, bin.candidates) for bin in found.bins] == [(0.2, 4), (0.9, 2)]


def test_the_bootstrap_of_two_problems_has_three_means() -> None:
    """Of 0 and 1 the means are 0, 1/2 and 1 with probabilities 1/4, 1/2 and 1/4."""
    assert bootstrap_interval([0, 1], 2_000).low == 0
    half = bootstrap_interval([0, 1], 2_000, confidence=0.4)
    assert (half.mean, half.low, half.high) == (0.5, 0.5, 0.5)


def test_the_bootstrap_covers_what_the_normal_approximation_does() -> None:
    values = np.random.default_rng(3).random(400)
    found = bootstrap_interval(values, 4_000, seed=1)
    reach = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - reach, abs=0.1 * reach)
    assert found.high == pytest.approx(values.mean() + reach, abs=0.1 * reach)


def test_the_bootstrap_is_seeded_and_independent_of_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(30)
    found = bootstrap_interval(values, 200, seed=5)
    assert found != bootstrap_interval(values, 200, seed=6)
    monkeypatch.setattr("quietstar.statistics.intervals.BLOCK", 100)
    blocks = bootstrap_interval(values, 200, seed=5)
    assert (found.low, found.high) == pytest.approx((blocks.low, blocks.high), rel=1e-12)


def test_a_difference_is_paired() -> None:
    """Each problem differs by about 0.1, the problems among each other by far more."""
    random = np.random.default_rng(0)
    second = random.random(50)
    first = second + 0.1 + 0.01 * random.standard_normal(50)
    found = paired_difference(first, second)
    assert found.above_zero and not found.below_zero
    assert found.high - found.low < 0.02
    together = bootstrap_intervals(np.stack([first, second, first - second], axis=1))
    assert (together[2].low, together[2].high) == pytest.approx((found.low, found.high))


def test_one_problem_has_no_interval_and_equal_ones_no_width() -> None:
    alone = bootstrap_interval([0.3])
    assert (alone.mean, alone.low, alone.high, alone.problems) == (0.3, None, None, 1)
    assert not alone.above_zero
    assert str(alone) == "0.300"
    assert str(bootstrap_interval([1, 1, 1])) == "1.000 [1.000, 1.000]"


def test_step_counts_worked_out_by_hand() -> None:
    found = compare_step_counts([1, 2, 2, 8], [1, 2, 3, 4])
    assert (found.problems, found.model, found.human, found.equal, found.fewer) == (4, 3.25, 2.5, 0.5, 0.25)
    assert found.pearson == pytest.approx(10.5 / (30.75 * 5) ** 0.5)
    assert found.spearman == pytest.approx(0.9486832980505138)  # 4.5 / sqrt(4.5 * 5)


def test_always_as_many_steps_have_no_correlation() -> None:
    found = compare_step_counts([2, 2], [1, 3])
    assert (found.pearson, found.spearman) == (None, None)


def test_impossible_arguments_are_named() -> None:
    for call, error, words in [
        (lambda: auroc([nan], [True]), DataError, "^scores: NaN"),
        (lambda: auroc([1.0], [True, False]), DataError, "scores has 1, labels has 2"),
        (lambda: calibration([1.5], [True]), DataError, "^probabilities: 1.5 at index 0; needs 0 to 1"),
        (lambda: calibration([0.5], [True], bins=0), ConfigError, "^bins: is 0"),
        (lambda: bootstrap_interval([]), DataError, "^values: has the shape"),
        (lambda: bootstrap_interval([np.inf, 0.0]), DataError, "^values: inf; needs finite"),
        (lambda: bootstrap_interval([1.0], 0), ConfigError, "^resamples: is 0"),
        (lambda: bootstrap_interval([1.0], confidence=1.0), ConfigError, r"^confidence: is 1\.0"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), DataError, "first has 1, second has 2"),
        (lambda: compare_step_counts([1, 2], [1]), DataError, "model has 2, human has 1"),
    ]:
        with pytest.raises(error, match=words):
            call()
