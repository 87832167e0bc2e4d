"""The answers of mathematical problems: finding them in a text, writing them in one canonical way, and comparing them.

Plain numbers come first, then answers in LaTeX boxes as MATH has them, then math-verify's comparison of expressions.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from importlib import import_module
from importlib.util import find_spec
from typing import Any

_MINUS = str.maketrans("\u2212\u2013\u2010\u2011\uff0d", "-----")
_SPACES = str.maketrans("\u00a0\u202f\u2009", "   ")
_CURRENCY = r"(?:\\?(?:US)?\$|[€£¥₹])"
_DIGITS = r"\d{1,3}(?:,\d{3})+|\d{1,3}(?:[\u00a0\u202f\u2009]\d{3})+|\d+"
_DECIMAL = rf"(?:(?:{_DIGITS})(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"""(?P<outer>[-+]?)\s*{_CURRENCY}?\s*(?P<inner>[-+]?)\s*
    (?:(?P<whole>\d+)\s+(?P<part>\d+/\d+) | (?P<above>{_DECIMAL})\s*/\s*(?P<below>{_DECIMAL}) | (?P<decimal>{_DECIMAL}))
    (?P<rest>.*)""",
    re.VERBOSE | re.DOTALL,
)
_UNIT_EXPONENT = re.compile(r"(?<=[A-Za-z])(?:\^?[23](?![\d.])|\^\{[23]\})")
_UNITS = re.compile(r"\s*(?:%|\\%|°|(?:per\s+|/\s*)?[^\W\d_]|[€£¥₹$]).*", re.DOTALL)
_NOT_UNITS = re.compile(
    r"\b(hundred|thousand|million|billion|trillion|dozens?|k|half|halves|quarters?|thirds?|squared|cubed|point|plus|minus"
    r"|times|and|or|to)\b|[\d=<>+*^!\\]",
    re.IGNORECASE,
)
_LONGEST = 4000  # Python refuses to convert longer integers; decimals of any length need no conversion


def first_after_marker(text: str, marker: str = "####") -> str | None:
    """Returns the text after the first `marker`, up to the end of its line.

    Returns:
        The text without white space around it; None where there is no marker, or nothing after it on its line.
    """
    _, found, after = text.partition(marker)
    line = after.partition("\n")[0].strip()
    return line if found and line else None


def canonical_number(text: str, *, units: bool = True) -> str | None:
    """Returns the canonical form of a number, exact at any size: `$1,080.50` and `1080.5 dollars` become `1080.5`.

    Commas and narrow spaces between thousands, currency and percent signs, a unit, a trailing dot, a plus sign and
    needless zeros are removed; the minus sign never is. Fractions and mixed numbers are reduced, and become decimals
    where that is exact: `2/4` is `0.5`, `1 1/3` is `4/3`.

    Args:
        text: Text of one number, with or without a unit. `10-20`, `3 apples and 4 pears`, `42 + x`, `5:30`, `1,2` and
            `5 million` are not accepted as numbers: a wrong answer must not pass for a right one.
        units: Whether words may follow the number. Without, `5x` is not a number.

    Returns:
        `-?[0-9]+`, with a decimal part that does not end in 0, or with a denominator; None for anything else.
    """
    match = _NUMBER.fullmatch(re.sub(r"[ \t\r\n]+", " ", text.strip()).translate(_MINUS))
    if match is None or (match["outer"] and match["inner"]) or not _harmless(match["rest"], units):
        return None
    negative = "-" in (match["outer"], match["inner"])
    if match["decimal"] is not None:
        magnitude: str | None = _plain_decimal(match["decimal"])
    elif match["whole"] is not None:
        magnitude = _fraction(match["part"].partition("/"), match["whole"])
    else:
        magnitude = _fraction((match["above"], "/", match["below"]))
    if magnitude is None or magnitude == "0":
        return magnitude
    return "-" + magnitude if negative else magnitude


def _harmless(rest: str, units: bool) -> bool:
    rest = rest.translate(_SPACES).strip().rstrip(".").rstrip()
    if not rest or rest in ("%", "\\%"):
        return True
    rest = _UNIT_EXPONENT.sub("", rest)
    return units and _UNITS.fullmatch(rest) is not None and not _NOT_UNITS.search(rest.removeprefix("\\%"))


def _plain_decimal(text: str) -> str:
    whole, _, part = re.sub(r"[^\d.]", "", text).partition(".")
    part = part.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{part}" if part else "")


def _fraction(parts: tuple[str, str, str], whole: str = "0") -> str | None:
    above, below = _plain_decimal(parts[0]), _plain_decimal(parts[2])
    if below == "0" or max(map(len, (above, below, whole))) > _LONGEST:
        return None
    value = Fraction(whole) + Fraction(above) / Fraction(below)
    return _shortest(value)


def _shortest(value: Fraction) -> str | None:
    """Returns a finite decimal where there is one, else a fraction; None where the numbers are too long."""
    twos = (value.denominator & -value.denominator).bit_length() - 1
    rest, fives = value.denominator >> twos, 0
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    places = max(twos, fives)
    scaled = value * 10**places
    numerator = scaled.numerator if rest == 1 else value.numerator
    if max(abs(numerator), value.denominator) >= 10**_LONGEST:
        return None
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    digits = str(numerator).rjust(places + 1, "0")
    return _plain_decimal(f"{digits[:-places]}.{digits[-places:]}") if places else digits


_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{|\s|[\d.+-])")
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_CLOSERS = re.compile(r"[^\n]*(?:\n[ \t]*(?:\\\]|\$\$|\\end\{[^{}\n]*\})[^\n]*)*")
_NOISE = re.compile(r"\\[!,;: ]|\\(?:left|right)(?![A-Za-z])|\^\{?\\circ\}?|\\circ(?![A-Za-z])|\\?[%$]|(?<=\d)~(?=\d)")
_WORDS = re.compile(r"\\(?:text|textrm|textbf|mbox|mathrm|mathbf)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[cdt]?frac\s*(?:\{\s*([-+\d.,]+)\s*\}|(\d))\s*(?:\{\s*([\d.,]+)\s*\}|(\d))")


def last_box(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{...}`, with braces nested to any depth, or of `\boxed 5` without braces.

    Returns:
        The content; None where there is no box, or it is not closed.
    """
    found = list(_BOX.finditer(text))
    place = _content(text, found[-1].end()) if found else None
    return None if place is None else text[slice(*place)].strip()


def through_box(text: str) -> str:
    r"""Returns a text up to the line of the last complete box in the first paragraph that has one; all of it without a
    box.

    That box is the answer, whatever other problems the text solves afterwards. A line that closes the formula around
    the box, such as `\]`, is kept.
    """
    places = [place for box in _BOX.finditer(text) if (place := _content(text, box.end())) is not None]
    if not places:
        return text
    blank = _BLANK_LINE.search(text, places[0][1])
    end = max(stop for start, stop in places if blank is None or start < blank.start())
    closers = _CLOSERS.match(text, end)
    return text if closers is None else text[: closers.end()]


def _content(text: str, start: int) -> tuple[int, int] | None:
    """Returns where the content of a box begins and ends; None where it has none, or is not closed."""
    while text[start : start + 1].isspace():
        start += 1
    if not text.startswith("{", start):
        content = re.split(r"[\s$]", text[start:], maxsplit=1)[0].rstrip(".")
        return (start, start + len(content)) if content else None
    depth = 0
    for match in re.compile(r"\\.|[{}]").finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return start + 1, match.start()
    return None


def latex_number(text: str) -> str | None:
    r"""Applies `canonical_number` to a number in LaTeX: `\frac{7}{2}`, `-1\frac12`, `\$32,\!348`, `90^\circ`, `5\text{
    cm}`.

    Returns:
        The canonical number; None for anything that is not one number, such as `2\sqrt3`, `5x`, `101_2` or `(1,2)`.
    """
    text = _NOISE.sub("", text.replace("{,}", ",")).strip().rstrip("\\").rstrip()
    words = _WORDS.search(text)
    if words is not None:
        if text[words.end() :].strip(" .^23{}") or (words[1].strip() and canonical_number(f"1 {words[1]}") is None):
            return None
        text = text[: words.start()].strip()
    return canonical_number(_FRACTION.sub(_slashed, text), units=False)


def canonical_latex(text: str) -> str:
    """Returns a number as `latex_number` writes it, and any other expression without white space and LaTeX that do not
    change its meaning.
    """
    number = latex_number(text)
    return re.sub(r"\s+", "", _NOISE.sub("", text)).rstrip(".") if number is None else number


def _slashed(match: re.Match[str]) -> str:
    return f" {match[1] or match[2]}/{match[3] or match[4]}"


def can_compare() -> bool:
    """Returns whether math-verify is installed (`pip install 'quietstar[eval]'`)."""
    return find_spec("math_verify") is not None


def same_expression(gold: str, answer: str) -> bool:
    """Returns whether an answer equals the gold answer, both in LaTeX or as plain expressions; False without
    math-verify.

    There is no time limit: `2003^{2002^{2001}}` takes for ever. Call it in a process that can be ended.
    """
    if not can_compare():
        return False
    math_verify: Any = import_module("math_verify")  # optional, and sympy takes a second to load
    logging.getLogger("math_verify").setLevel(
        logging.ERROR
    )  # it warns that its own time limits, which use signals, are off
    expressions = [math_verify.parse(f"${text}$", parsing_timeout=None) for text in (gold, answer)]
    return all(expressions) and bool(math_verify.verify(*expressions, timeout_seconds=None))
