"""What is told of an outer loop's iterations, and when it warns."""

from __future__ import annotations

from math import log

import numpy as np
import pytest

from quietstar.errors import DataError
from quietstar.statistics.iterations import (
    Distinct,
    GroupMeasures,
    Growth,
    answer_entropy,
    by_group,
    coverage_falls,
    distinct_solutions,
    growth,
    held_out_falls,
    hinted_share,
    truncation_rate,
)


def solved(share: float, problems: int = 200) -> np.ndarray:
    """The first problems are solved: an iteration that solves fewer has lost some and gained none."""
    return (np.arange(problems) < share * problems).astype(float)


def test_growth_of_the_solved_set() -> None:
    found = growth([["a", "b"], ["b", "c", "d"], []])
    assert found == [Growth(2, 0, 0, 2), Growth(2, 1, 1, 4), Growth(0, 3, 0, 4)]


def test_distinct_solutions_are_of_solved_problems() -> None:
    assert distinct_solutions({"p": ["x", "y", "x"], "q": ["z"], "r": []}) == Distinct(2, 1.5, 2)
    assert distinct_solutions({"r": []}) == Distinct(0, 0.0, 0)


def test_shares() -> None:
    assert truncation_rate(["stop", "length", "length", "stop", "stop"]) == 0.4
    assert hinted_share([True, False, False, False]) == 0.25
    assert truncation_rate([]) == hinted_share([]) == 0.0


def test_entropy_of_answers() -> None:
    assert answer_entropy(["1", "1", "2", None]) == pytest.approx(1.5 * log(2))
    assert answer_entropy(["1", "1"]) == 0.0
    with pytest.raises(DataError, match=r"^answers: is empty"):
        answer_entropy([])


def test_groups_weigh_tokens_not_samples() -> None:
    found = by_group(["2", "1", "2"], [True, False, False], [-3.0, -1.0, -1.0], [1, 4, 3])
    assert found == {"1": GroupMeasures(1, 0.0, 0.25), "2": GroupMeasures(2, 0.5, 1.0)}
    assert list(found) == ["1", "2"]
    assert by_group(["1"], [False], [0.0], [0])["1"].nats_per_token is None
    with pytest.raises(DataError, match="groups has 1, correct has 2"):
        by_group(["1"], [True, True], [0.0, 0.0], [1, 1])
    with pytest.raises(DataError, match=r"^tokens: -1 at index 0"):
        by_group(["1"], [True], [0.0], [-1])


def test_warns_when_held_out_falls_while_training_rises() -> None:
    held_out = [solved(0.4), solved(0.6), solved(0.5), solved(0.45)]
    found = held_out_falls([0.5, 0.6, 0.7, 0.55], held_out)
    assert [(warning.iteration, warning.since) for warning in found] == [(2, 1)]  # at 3 training has fallen too
    assert found[0].message.startswith(
        "iteration 2, against 1: held-out accuracy falls from 60.0% to 50.0% (difference -0.100 [-0.14"
    )
    assert found[0].message.endswith("while training accuracy rises from 60.0% to 70.0%")


def test_a_slow_fall_is_measured_from_the_best_iteration() -> None:
    """Three of 200 problems are lost each time: chance, were it not for the sum."""
    held_out = [solved(0.6), solved(0.585), solved(0.57), solved(0.555)]
    found = held_out_falls([0.5, 0.6, 0.7, 0.8], held_out)
    assert [(warning.iteration, warning.since) for warning in found] == [(2, 0), (3, 0)]


def test_does_not_warn_of_chance() -> None:
    """As many problems are lost as the one that is gained and two more, of 200."""
    before, after = solved(0.5), solved(0.5)
    after[[0, 1, 2]], after[150] = 0, 1
    assert held_out_falls([0.5, 0.6], [before, after]) == []
    assert held_out_falls([0.5, 0.6], [[1.0], [0.0]]) == []  # a single problem
    assert held_out_falls([0.5], [before]) == []


def test_warns_when_pass_at_k_falls_while_pass_at_1_rises() -> None:
    once = [0.5 * solved(0.8), 0.75 * solved(0.7), 0.75 * solved(0.4)]
    found = coverage_falls(once, [solved(0.8), solved(0.7), solved(0.4)], 16)
    assert [(warning.iteration, warning.since) for warning in found] == [(1, 0)]  # at 2 pass@1 is lower as well
    assert "pass@16 falls from 80.0% to 70.0%" in found[0].message
    assert "pass@1 rises from 40.0% to 52.5%" in found[0].message


def test_a_rise_of_pass_at_1_by_chance_is_none() -> None:
    lucky = 0.5 * solved(0.8)
    lucky[0] = 1.0
    assert coverage_falls([0.5 * solved(0.8), lucky], [solved(0.8), solved(0.6)], 16) == []


def test_does_not_warn_when_both_rise_or_fall() -> None:
    up = [solved(0.3), solved(0.5)]
    assert coverage_falls(up, up, 4) == coverage_falls(up[::-1], up[::-1], 4) == []


def test_iterations_must_have_the_same_problems() -> None:
    with pytest.raises(DataError, match="training has 2, held_out has 1"):
        held_out_falls([0.1, 0.2], [solved(0.1)])
    with pytest.raises(DataError, match="first has 3, second has 2"):
        held_out_falls([0.1, 0.2], [[0, 1], [0, 1, 1]])
    with pytest.raises(DataError, match="pass@4 of iteration 1: NaN at index 0"):
        coverage_falls([[1.0], [1.0]], [[1.0], [float("nan")]], 4)
