"""Numbers as people write them."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quietstar.tasks.numbers import canonical_number, first_after_marker


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("1,080", "1080"),
        ("$1,080.50", "1080.5"),
        ("1\u202f000", "1000"),
        ("3.0", "3"),
        (".5", "0.5"),
        ("5.", "5"),
        ("007", "7"),
        ("-0.0", "0"),
        ("+5", "5"),
        ("-10", "-10"),
        ("\u221210", "-10"),
        ("- 10", "-10"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("50%", "50"),
        ("18 dollars.", "18"),
        ("18kg", "18"),
        ("60 km/h", "60"),
        ("9 cm^2", "9"),
        ("$20 per day", "20"),
        ("20\u20ac", "20"),
        ("2/4", "0.5"),
        ("-1/3", "-1/3"),
        ("1 1/3", "4/3"),
        ("-1 1/2", "-1.5"),
        ("1,000/3", "1000/3"),
    ],
)
def test_one_way_to_write_each_number(written: str, canonical: str) -> None:
    assert canonical_number(written) == canonical
    assert canonical_number(canonical) == canonical


@pytest.mark.parametrize(
    "written",
    [
        *("", "abc", "--5", "1/0", "10-20", "3 apples and 4 pears", "42 + x", "5:30", "1,2", "1,000,00", "5 or 6"),
        *("3 x 2", "5!", "5^2", "2\\sqrt{3}", "1e5", "1.2.3", "5 million", "2k", "5 and a half", "2 dozen", "3/4/2020"),
    ],
)
def test_what_is_not_one_number_is_none(written: str) -> None:
    assert canonical_number(written) is None


def test_a_letter_is_a_unit_only_where_units_are_allowed() -> None:
    assert canonical_number("5x") == "5"
    assert canonical_number("5x", units=False) is None


@settings(max_examples=30)
@given(st.fractions(max_denominator=10**6), st.sampled_from(["{}", "${}", " {} ", "{}.", "{} dollars", "{}%"]))
def test_fractions_stay_exact_and_keep_their_sign(value: Fraction, form: str) -> None:
    written = form.format(value)
    canonical = canonical_number(written)
    assert canonical is not None
    assert Fraction(canonical) == value


@settings(max_examples=30)
@given(st.integers(), st.integers(0, 4), st.integers(0, 3))
def test_integers_of_any_size_are_the_same_with_commas_and_zeros(value: int, before: int, after: int) -> None:
    sign, digits = ("-" if value < 0 else ""), str(abs(value))
    assert canonical_number(f"{sign}{abs(value):,}") == str(value)
    assert canonical_number(f"{sign}{'0' * before}{digits}.{'0' * after}") == str(value)


def test_more_digits_than_python_converts() -> None:
    digits = "123456789" * 1000
    assert canonical_number(f"-{digits}.50") == f"-{digits}.5"
    assert canonical_number(f"1/{digits}") is None


@settings(max_examples=30)
@given(st.text(alphabet="0123456789.,-+$%/ x()\u2212"))
def test_canonical_is_final(written: str) -> None:
    canonical = canonical_number(written)
    if canonical is not None:
        assert canonical_number(canonical) == canonical


def test_the_first_marker_counts_and_its_line_ends_the_answer() -> None:
    assert first_after_marker("So 72.\n#### 72\n\nQ: Next?\nA: 5\n#### 5") == "72"
    assert first_after_marker("#### \n5") is None
    assert first_after_marker("72") is None
