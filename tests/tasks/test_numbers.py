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
        *("3 x 2", "5!", "5^2", "2\\sqrt{3}", "1.2.3", "5 million", "2k", "5 and a half", "2 dozen", "3/4/2020"),
    ],
)
def test_what_is_not_one_number_is_none(written: str) -> None:
    assert canonical_number(written) is None


def test_a_letter_is_a_unit_only_where_units_are_allowed() -> None:
    assert canonical_number("5m") == "5"
    assert canonical_number("5m", units=False) is None


@pytest.mark.parametrize("prefix", ["5 {}", "5{}", "5 {} in total"])
@pytest.mark.parametrize(
    "word",
    [
        *(
            "millions",
            "zillion",
            "lakh",
            "crores",
            "dozens",
            "K",
            "bn",
            "MM",
            "thirds",
            "quarter",
            "hundredths",
            "pi",
            "squared",
        ),
        *(
            "plus",
            "or",
            "than",
            "least",
            "more",
            "times",
            "mod",
            "to",
            "twenty",
            "sqrt",
            "wrong",
            "not",
            "base",
            "inf",
            "fold",
        ),
    ],
)
def test_words_that_change_a_number_are_no_unit(prefix: str, word: str) -> None:
    """`5 lakh` passed for 5 where the gold answer was 5."""
    assert canonical_number(prefix.format(word)) is None


@pytest.mark.parametrize(
    "written",
    [
        "7e",
        "7i",
        "7x2",
        "7y",
        "7sin2",
        "7log10",
        "7nCr2",
        "7P3",
        "7\u2074",
        "7\u2083",
        "7\u03c0",
        "7\u4e07",
        "7\u221a2",
        "7\u00b2",
        "7\u2062" + "2",
        "0.33...",
        "0.3\u2026",
        "7!",
        "7?",
        "7**2",
        "7-m",
        "$7$8",
        "3$7$",
        "7\\,2",
        "\\frac{1}{2}3",
        "2 3/2",
        "7x",
        "<strike>7</strike>",
        "<s>7</s>",
        "7<s>8",
        "7<|user|>8",
        "MOD = 7",
        r"\sin x = 7",
        r"2\text{Area} = 7",
        "7!!",
    ],
)
def test_what_is_attached_to_a_number_is_never_dropped(written: str) -> None:
    assert canonical_number(written) is None


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("3.2e4", "32000"),
        ("4E-3", "0.004"),
        ("1e+20", "1" + "0" * 20),
        ("6.02 x 10^3", "6020"),
        ("5\u00d710\u207b\u00b2", "0.05"),
        ("2 \\cdot 10^{4}", "20000"),
        ("\u0664\u0662", "42"),
        ("\uff14\uff12", "42"),
        ("\U0001d7d2\U0001d7d0", "42"),
        ("\u096a\u0968", "42"),
        ("\u0663\u066b\u0665", "3.5"),
        ("1\u00be", "1.75"),
        ("\u2154", "2/3"),
        ("3\u20444", "0.75"),
        ("12,34,567", "1234567"),
        ("1'234", "1234"),
        ("50 m\u00b2", "50"),
        ("9.8 m/s^2", "9.8"),
        ("3 cubic feet", "3"),
        ("12 left over", "12"),
        ("4 people's", "4"),
    ],
)
def test_numbers_in_the_spellings_of_many_writers(written: str, canonical: str) -> None:
    assert canonical_number(written) == canonical


@pytest.mark.parametrize(
    "form",
    [
        "__{}__",
        "***{}***",
        "``{}``",
        "_{}_",
        "**{}** apples",
        "${}$ apples",
        "$${}$$",
        r"\({}\)",
        r"\boxed{{{}}} apples",
        r"\textbf{{{}}}",
        '"{}"',
        "y = {}",
        "Total cost = ${}",
        "= {}",
        "The final answer is {}.",
        "Answer: {}",
        "{}<|endoftext|>",
        "{}<|eot_id|>junk",
        "<s>{}",
        "\ufeff{}",
        "{}\u2060",
        "<answer>{}</answer>",
        "<b>{}</b>",
        r"\text{{{}}}",
        r"{} \text{{ cm}}",
        r"{}\,\text{{cm}}^2",
        r"\boldsymbol{{{}}}",
        r"\underline{{{}}}",
        "\u00ab{}\u00bb",
        "{}[PAD]",
        "{}<br/>",
        "{}\u3002",
        "\x1b[32m{}\x1b[0m",
        "Result: {}",
        "My answer is {}",
        "h(3) = {}",
    ],
)
def test_markup_changes_no_number(form: str) -> None:
    for number in ("42", "3.5", "-6", "1,080", "2/3"):
        assert canonical_number(form.format(number)) == canonical_number(number)


NUMBERS = st.one_of(st.fractions(max_denominator=1000), st.integers(-(10**12), 10**12).map(Fraction))


def spellings(value: Fraction) -> list[str]:
    """Returns ways to write a number, built from its definition and without the reader."""
    sign = "-" if value < 0 else ""
    above, below = abs(value.numerator), value.denominator
    plain = f"{above}/{below}" if below > 1 else str(above)
    found = [
        plain,
        rf"\frac{{{above}}}{{{below}}}",
        plain.translate({48 + digit: 0x660 + digit for digit in range(10)}),
    ]
    if below > 1 and above > below:
        found.append(f"{above // below} {above % below}/{below}")
    if below == 1:
        found += [f"{above:,}", f"{above:,}".replace(",", "\u2009"), f"{above}.00", f"{above}e0"]
    signs = [sign, sign.replace("-", "\u2212"), sign.replace("-", "\u2013")]
    return [f"{sign}{text}" for sign in signs for text in found] + [
        f"{sign}${plain}",
        f"**{sign}{plain}**",
        f"x = {sign}{plain}",
    ]


@settings(max_examples=60)
@given(NUMBERS)
def test_every_spelling_equals_its_number(value: Fraction) -> None:
    for text in spellings(value):
        read = canonical_number(text)
        assert read is not None, text
        assert Fraction(read) == value, text


CHANGING = [
    "e3",
    "x2",
    "\u00b2",
    "^2",
    "!",
    "k",
    " million",
    " dozen",
    " thirds",
    "/0",
    "-7",
    " + 1",
    ":30",
    ",5",
    "_2",
    "...",
    " or 6",
    " squared",
    "\u03c0",
    "i",
    " times 2",
    " and 3",
    "**2",
    "%3",
    r"\sqrt2",
    r"\pi",
    " 1/2 3",
    " x 2",
]
BEFORE = [
    "1e",
    "2^",
    "sqrt ",
    "\u221a",
    "about ",
    "~",
    "> ",
    "2 * ",
    "log ",
    "not ",
    "0x",
    "5 - ",
    "3 and ",
    "1:",
    "--",
    "\u00b1",
    "2x = ",
]


@settings(max_examples=60)
@given(st.integers(2, 10**6), st.sampled_from(CHANGING), st.sampled_from(BEFORE))
def test_what_changes_the_value_before_or_behind_is_refused(value: int, behind: str, before: str) -> None:
    for text in (f"{value}{behind}", f"{before}{value}"):
        read = canonical_number(text)
        assert read != str(value), text


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


SCALES = """tens twenties ninety nineties fives sixes thou mill bil trill Millionen Milliarden milliarde miljoen
miljard milhões bilhões miliardi milioni milyon milyar cientos hundert Hunderte Tsd. ribu juta doz. G's K's
bps permil ppt milli micro nano hecto deci kUSD MEUR bnUSD TEUR"""


@pytest.mark.parametrize("word", SCALES.split())
def test_words_of_other_writers_and_languages_that_scale_a_number_are_no_unit(word: str) -> None:
    """`5 Millionen`, `5 tens` and `5 bps` were read as 5, and so passed for the right answer 5."""
    assert canonical_number(f"5 {word}") is None and canonical_number(f"5{word}") is None


@pytest.mark.parametrize(
    "written", ["0,123", "0,5", "-0,250", "0,000", "0\u2009123", "0'123", "00,000", "0,12,345", "€0,125", "0{,}375"]
)
def test_a_group_of_thousands_does_not_begin_with_zero(written: str) -> None:
    """`0,123` is 0.123 with a decimal comma; it was read as 123."""
    assert canonical_number(written) is None


@pytest.mark.parametrize("written", ["5..", "$5..", "1/2..", "5 dollars..", "0.3..", "-5..", "1.5e3.."])
def test_a_number_that_breaks_off_is_not_read(written: str) -> None:
    assert canonical_number(written) is None and canonical_number(written[:-1]) is not None


@pytest.mark.parametrize("word", ["ish", "something", "barely", "hardly", "unless", "wrongly", "mistakenly"])
def test_words_that_doubt_a_number_are_no_unit(word: str) -> None:
    assert canonical_number(f"5 {word}") is None


@pytest.mark.parametrize(
    "unit",
    [
        "billets",
        "trillers",
        "milkshakes",
        "fish",
        "pairs",
        "couples",
        "decades",
        "tents",
        "nickels",
        "centimeters",
        "minutes",
        "USD",
    ],
)
def test_units_that_look_like_scales_are_units(unit: str) -> None:
    assert canonical_number(f"5 {unit}") == "5"


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
