"""Words beside a number: only a known unit or a plain noun leaves it as it is.

The words that change a number are not the reader's own: number words that a speller wrote in some twenty languages,
their short forms, and English words by what they do. `5 hundert`, `5 doz` and `5 deficit` were read as 5 while there
was a list of exceptions.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quietstar.evaluation.answers import load_format
from quietstar.tasks.numbers import canonical_number, numbers_in


def words(text: str, between: str = " ") -> list[str]:
    return " ".join(text.split()).split(between)


SPELLED_OUT = words(
    """einhundert eintausend Million Millionen Milliarde zwölf zwanzig hundert tausend Dutzend mille million cinq
    millions milliard milliards douze vingt vingts milliers centaines cien mil millón millones doce veinte
    doscientos cento milione miliardo milioni miliardi dodici venti cem milhão milhões doze vinte duzentos honderd
    duizend miljoen vijf miljard twaalf twintig ethundrede ettusind millioner milliarder tolv tyve halvtreds seks
    etthundra miljon miljoner tjugo hundre tusen millard sata tuhat miljoona miljardi kaksitoista sto tysiąc
    milion milionów miliard dwanaście tisíc dvanáct miliarda száz ezer egymillió tizenkettő sută mie milioane
    doisprezece yüz bin milyon milyar yirmi seratus seribu juta miliar dua belas sebelas šimtas tūkstantis
    milijonas milijardas dvylika simts tūkstotis miljons tisoč milijon dvajset miliono dek dudek nghìn triệu trăm
    mười lakh crore arab kharab oku koti 万 億 兆 百 千 만 억 тысяч млн"""
)
SHORTENED = words("""doz dz doz. thou thsd tsd Tsd. Mio. Mrd. mln mlrd bn tn trn MM K k B T G hun gro bps ppm""")
CHANGING = words(
    """million thousands dozen score gross plus minus less more fewer least most larger smaller max maximum minimum
    upwards afterwards onwards short shy treble double thrice squared cubed factorial inverse halves thirds
    sevenths excluded excluding deficit deficits overdrawn debt debts loss losses wrong incorrect false ish odd
    something mod modulo times over under divided choose negative approximately nearly about or to until versus
    unless grosses octals twentynineths permille"""
)
BEFORE = words(
    """minus negative about roughly nearly almost not never under over above below twice thrice half double plus
    times least most than around exceeding approximately or without except log sqrt mod"""
)
NAMES = words(
    """square cube inverse opposite reciprocal half double triple root negative complement conjugate log sine
    factorial remainder quotient loss debt deficit"""
)
PLAIN = words(
    """clips; dollars; apples; red apples; students; pages per day; slices of pizza; miles/hour; feet; people;
    children; years old; minutes; cents each; USD; CHF; kr; Ω; µm; kWh; square feet; chocolate bars; bills; weeks;
    pills; baseball cards; ice cream cones;
    hours a week; apples in total; pounds of flour; euros altogether; pct; kg; o'clock; marbles left;
    Blinkets""",
    "; ",
)


@pytest.mark.parametrize("word", [*SPELLED_OUT, *SHORTENED, *CHANGING])
def test_a_word_that_changes_a_number_is_refused_behind_it(word: str) -> None:
    for form in ("5 {}", "5{}", "5-{}", "5 {} dollars", "5 {} apples", "${} {}"):
        written = form.format(5, word) if form.startswith("$") else form.format(word)
        assert canonical_number(written) is None, written
    assert next(numbers_in(f" 5 {word}."))[0] is None
    assert next(numbers_in(f" $5 {word}, he says."))[0] is None


@pytest.mark.parametrize("word", BEFORE)
def test_a_word_that_changes_a_number_is_refused_before_it(word: str) -> None:
    """After `the answer is`, ` minus 5.` and `: negative $5` were 5."""
    form = load_format("gsm8k", None)
    for text in (f" {word} 5.", f": {word} $5", f" it is {word} the 5 apples", f" **{word}** 5"):
        assert form.concluded(text) == "", text
    assert canonical_number(f"{word} 5") is None


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_changes_a_number_is_no_name(name: str) -> None:
    for text in (f"{name} = 5", f"the {name} = 5", f"x {name} = 5", f"total {name} = $5"):
        assert canonical_number(text) is None, text
        assert next(numbers_in(f"so {text}."))[0] is None, text


@pytest.mark.parametrize("words", PLAIN)
def test_a_unit_or_a_plain_noun_leaves_the_number(words: str) -> None:
    assert canonical_number(f"72 {words}") == "72"
    assert canonical_number(f"-1,080.50 {words}.") == "-1080.5"
    assert next(numbers_in(f" 72 {words}, I think."))[0] == "72"


@pytest.mark.parametrize("name", ["x", "n", "Total cost", "answer", "number of apples", "minutes", "price"])
def test_a_plain_name_leaves_the_number(name: str) -> None:
    assert canonical_number(f"{name} = 72") == "72"
    assert next(numbers_in(f"so {name} = 72."))[0] == "72"


@pytest.mark.parametrize("sign", ["$", "USD", "Rs", "Rs.", "R$", "€", "£", "¥", "₹", "CHF", "kr", "US$", "INR", "EUR"])
def test_a_currency_stands_on_either_side_and_no_letter_beside_it_is_a_unit(sign: str) -> None:
    """`USD 72`, `Rs 72` and `R$5` were refused, and `$5m` was 5."""
    assert canonical_number(f"{sign} 72") == canonical_number(f"{sign}72.00") == canonical_number(f"72 {sign}") == "72"
    assert canonical_number(f"-{sign} 72") == "-72"
    assert next(numbers_in(f" {sign} 72."))[0] == "72"
    for letter in "mMbBkKtTgcL":
        for text in (f"{sign} 5{letter}", f"{sign}5 {letter}", f"5{letter} {sign}"):
            assert canonical_number(text) is None, text
        assert next(numbers_in(f" {sign} 5{letter}."))[0] is None
    assert canonical_number(f"{sign} 5 per hour") == canonical_number(f"{sign}5/hour") == "5"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 1 000.", None),
        (" 10 000 dollars", None),
        (" 1 234 567", None),
        (" 7 200 apples.", None),
        (" 2 1/2 hours", "2.5"),
        (" 1\u202f000 dollars", "1000"),
        (" 5 feet 6 inches", None),
        (" 5 dollars and 50 cents", None),
        (" 5 to 6", None),
        (" 3 of 5", None),
        (" 2x = 5", None),
        (" x = 5", "5"),
        (" - 3", "-3"),
        (" is - 3", "-3"),
        (" apples - 3", None),
        (" equal to 5.", "5"),
        (" up to 5", None),
        (" 72 clips in April and May", "72"),
        (" 72, minus nothing", "72"),
        (" 5 is not right", None),
        (" 5 < 6", None),
        (" 48 + 24 = 72 clips", "72"),
    ],
)
def test_a_number_of_a_sentence_is_read_whole_or_not_at_all(text: str, answer: str | None) -> None:
    """` 1 000.` was 1, and 0 where the last number counts."""
    read = [number for number, _ in numbers_in(text)]
    assert read[0] == answer
    assert answer is not None or set(read) <= {None, "6"}


@pytest.mark.parametrize(
    "text",
    [
        *(" 8 miles 40", " 8 lbs 6 oz", " 8 minutes, 6 seconds", " 8 weeks, 6 days", " 8 euros 60 cents"),
        *(" 8 days and a half", " 8 percent of 60", " 8 out of 60", " 8 per 60", " 8% of 60", " 8, 60", " 8; 60"),
        *(" 8 (hundred)", " 8 [dozen]", " 8 (in millions)", " 8 i", " 8 X 60", " 8! ", " 8 !", " != 8", " <= 8"),
        *(r" \sqrt{ 8 }", r" \frac{ 8 }{ 60 }", " ~~8~~", " 8<s>6", " <del>8</del>"),
    ],
)
def test_a_part_of_a_number_of_a_sentence_is_not_read_alone(text: str) -> None:
    """` 8 miles 40` was 40 where the last number counts, and ` 8 percent of 60` was 60."""
    assert {number for number, _ in numbers_in(text)} <= {None}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 8 (eight)", "8"),
        (" 8 (not 9)", "8"),
        (" 8 apples, red ones", "8"),
        (" 8 apples in April", "8"),
        (r" \[ \boxed{8} \]", "8"),
        (r" \boxed{ 8 }.", "8"),
        (" I think 8", "8"),
        (" a remark (see below): 8", "8"),
        (" 2, so 8", "8"),
        (" 2 apples. 8 pears", "8"),
        (" 2 + 6 = 8, 8", None),
    ],
)
def test_a_number_beside_a_remark_is_read(text: str, answer: str | None) -> None:
    assert next(number for number, _ in numbers_in(text) if number != "2") == answer


def test_a_verb_is_no_unit_of_a_pair() -> None:
    assert [number for number, _ in numbers_in(" each of the 2 gets 8")][-1] == "8"
    assert [number for number, _ in numbers_in(" each of the 2 hours 8")][-1] is None


@settings(max_examples=200)
@given(
    st.integers(2, 10**9),
    st.sampled_from([*SPELLED_OUT, *SHORTENED, *CHANGING]),
    st.sampled_from(BEFORE),
    st.sampled_from(["{0} {1}", "{0}{1}", "{0:,} {1}", "**{0}** {1}", "${0} {1}", "{0} {1}.", "{0}.5 {1}"]),
    st.sampled_from(["{1} {0}", "{1} ${0}", "{1} {0:,} dollars", "{1} **{0}**", "{1} {0}.", "({1} {0})"]),
)
def test_no_neighbour_is_read_as_the_number(value: int, behind: str, before: str, after_form: str, form: str) -> None:
    for text in (after_form.format(value, behind), form.format(value, before)):
        assert canonical_number(text) is None, text
        assert {number for number, _ in numbers_in(f" {text}")} <= {None}, text
