"""Expressions are read whole or not at all: a library read `36\\text{ million}` as 36, and that taught a model."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quietstar.tasks.expressions import same_expression

EQUAL = [
    ("2", r"\sqrt{4}"),
    ("(a-b)(a+b)", "a^2-b^2"),
    ("1024", "2^{10}"),
    ("6", r"\binom{4}{2}"),
    ("24", "4!"),
    ("3", r"\log_2 8"),
    ("-2", r"\sqrt[3]{-8}"),
    ("4√2", r"\sqrt{32}"),
    (r"4\sqrt(2)", r"4\sqrt{2}"),
    ("1,2", "2, 1"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"\left(1,\frac12\right)", "(1, 0.5)"),
    ("[0,1)", "[0, 1)"),
    (r"(-\infty, 2]", r"(-\infty,2]"),
    ("y = 2x+1", "1+2x"),
    ("x+y=5", "y+x=5"),
    (r"\frac{\pi}{2}", r"\frac{1}{2}\pi"),
    ("1/2^{99}", "2^{-99}"),
    ("sqrt(2)/2", r"\frac{1}{\sqrt{2}}"),
    ("2i", r"\sqrt{-4}"),
    ("x²", "x*x"),
    ("**x+1**", "$1+x$"),
    (r"2\sin x\cos x", r"2\cos(x)\sin(x)"),
]
DIFFERENT = [
    ("7", r"7\text{ billion}"),
    ("7", "7_8"),
    ("7", r"x=7\lor x=8"),
    ("7", r"7 \pm 1"),
    ("7", r"7\bmod 3"),
    ("7", r"x\in\{7\}"),
    ("7", r"7 \text{ or } 8"),
    ("7", r"\boxed{7}\boxed{8}"),
    ("7√3", "7√5"),
    ("1/3^{99}", "1/3^{98}"),
    ("10^{-12}", "0"),
    ("1/3", "0.3333333333"),
    (r"\pi", "3.14159265358979"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(2,1)"),
    ("1,2", "1,2,3"),
    (r"\{1,1\}", r"\{1\}"),
    ("x", "X+1"),
    ("1/2x", "x/2"),  # read in two ways
    (r"\infty", r"\infty-\infty"),
    ("1", "0^0"),
    ("1", r"\frac{1}{0}"),
    ("7", "seven"),
    ("", ""),
]


NAMED_ALIKE = [
    ("x = 5, y = 6", "y=6,x=5"),
    ("y = x^2+1", "x^2+1 = y"),
    ("3 = t", "t = 3"),
    (r"\theta = \frac{\pi}{2}", r"\frac{\pi}{2} = \theta"),
    ("r = 4", "4"),
    ("4 = r", "4.0"),
    ("a^2 = 9", "9 = a*a"),
    ("$n = 7$", r"\boxed{n = 7}"),
    ("z = x + y", "y + x"),
]
NAMED_OTHERWISE = [
    ("x = 5, y = 6", "x = 6, y = 5"),
    ("x = 3", "y = 3"),
    ("3 = x", "3 = y"),
    ("a = 1, b = 2", "1, 2"),
    ("x = 1", "x = 1, y = 2"),
    ("f = 2g", "h = 2g"),
    ("x^2 = 9", "9"),
    ("x = x + 1", "x + 1"),
    (r"\alpha = 30", r"\beta = 30"),
    ("p = 2, q = p", "p = 2, q = q"),
    ("5 = 5", "3 = 3"),
    ("2x = 6", "6"),
]


@pytest.mark.parametrize(("one", "other"), NAMED_ALIKE)
def test_the_sides_of_an_equation_may_change_places_and_one_name_may_be_missing(one: str, other: str) -> None:
    assert same_expression(one, other) and same_expression(other, one)


@pytest.mark.parametrize(("one", "other"), NAMED_OTHERWISE)
def test_the_value_of_another_name_is_another_answer(one: str, other: str) -> None:
    """Both names were dropped: `x = 5, y = 6` and `x = 6, y = 5` were equal, and so were `x = 3` and `y = 3`."""
    assert not same_expression(one, other) and not same_expression(other, one)


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_expressions_in_different_words(one: str, other: str) -> None:
    assert same_expression(one, other)
    assert same_expression(other, one)
    assert same_expression(one, one)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_a_part_of_an_expression_is_not_equal_to_it(one: str, other: str) -> None:
    assert not same_expression(one, other)
    assert not same_expression(other, one)


@pytest.mark.parametrize(
    "text",
    [
        "2003^{2002^{2001}}",
        "9999999!",
        "9^9^9^9",
        "(x+1)^{99999}",
        r"10^9 \log 29",
        "{" * 5000,
        "-" * 900,
        r"\sqrt" * 300,
    ],
)
def test_what_has_no_end_is_not_computed(text: str) -> None:
    assert not same_expression("5", text)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\frac0.5", "0"),
        (r"\frac12.5", "2"),
        (r"\frac3.", "1"),
        (r"\sqrt.5", "2"),
        (r"\binom4.2", "6"),
        ("9" * 5000, "x"),
        ("-" + "7" * 4400, r"\sqrt2"),
        ("0." + "3" * 5000, r"\pi"),
        ("9" * 5000, "9" * 4999),
    ],
)
def test_what_sympy_cannot_take_is_unequal(one: str, other: str) -> None:
    """A point without digits, which LaTeX takes for the argument of a command, and long numbers raised TypeError."""
    assert not same_expression(one, other) and not same_expression(other, one)


@pytest.mark.parametrize("number", ["9" * 5000, "-0." + "3" * 4500, "1" + "0" * 4400])
def test_long_numbers_equal_themselves(number: str) -> None:
    assert same_expression(number, f"+{number}" if number[0] != "-" else f" {number} ")


def joined(part: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(part, st.sampled_from("+-*"), part).map(lambda parts: f"({''.join(parts)})")


@settings(max_examples=60)
@given(st.recursive(st.integers(0, 9).map(str), joined, max_leaves=6))
def test_arithmetic_agrees_with_python(text: str) -> None:
    value = Fraction(eval(text))
    assert same_expression(str(value), text)
    assert not same_expression(str(value + 1), text)
