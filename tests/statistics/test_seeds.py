"""Student's t interval against printed tables and a case worked out by hand."""

from __future__ import annotations

import math

import pytest

from quietstar.statistics.intervals import estimate, student_t_quantile


@pytest.mark.parametrize(
    ("confidence", "degrees_of_freedom", "quantile"),
    [
        (0.5, 1, 1.0),
        (0.95, 1, 12.7062),
        (0.95, 2, 4.30265),
        (0.95, 3, 3.18245),
        (0.95, 4, 2.77645),
        (0.95, 9, 2.26216),
        (0.95, 30, 2.04227),
        (0.99, 5, 4.03214),
        (0.90, 6, 1.94318),
        (0.95, 1000, 1.96234),
    ],
)
def test_quantiles_are_those_of_the_tables(confidence: float, degrees_of_freedom: int, quantile: float) -> None:
    assert student_t_quantile(confidence, degrees_of_freedom) == pytest.approx(quantile, rel=2e-6)


def test_a_quantile_with_a_closed_form() -> None:
    """With two degrees of freedom t = p sqrt(2 / (1 - p^2))."""
    for p in (0.1, 0.5, 0.9, 0.95, 0.999):
        assert student_t_quantile(p, 2) == pytest.approx(p * math.sqrt(2 / (1 - p * p)), rel=1e-12)


def test_an_interval_worked_out_by_hand() -> None:
    """Of 1, 2, 3: variance 1, standard error 1 / sqrt 3, t = 4.30265."""
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.standard_error) == (2.0, pytest.approx(0.57735027))
    assert (found.low, found.high) == (pytest.approx(-0.484138, abs=1e-6), pytest.approx(4.484138, abs=1e-6))
    assert str(found) == "2.000 ± 0.577 [-0.484, 4.484]"


def test_one_value_says_nothing_of_the_spread() -> None:
    assert str(estimate([-0.0001])) == "0.000"
    assert estimate([3.0]).low is None
