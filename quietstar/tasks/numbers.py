"""The answers of mathematical problems: finding them in a text, writing them in one canonical way, and comparing them.

A number is read whole or not at all: what stands after its digits has to be a known unit or plain words. Expressions
are compared exactly, by sympy.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

_LONGEST = 4000  # Python refuses to convert longer integers; decimals of any length need no conversion

# How a text looks: one character for each of its kind, and no markup.
_THIN = "\u202f"
_SAME = {
    **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full width
    **dict.fromkeys(map(ord, "\u2212\u2013\u2010\u2011\ufe63\uff0d"), "-"),
    **dict.fromkeys(map(ord, "\u2044\u2215"), "/"),
    **dict.fromkeys(map(ord, "\u066a\ufe6a"), "%"),
    **dict.fromkeys(map(ord, "\ufe0e\ufe0f"), ""),
    ord("\u066b"): ".",
    ord("\u066c"): ",",
    ord("\u3000"): " ",
}
_INVISIBLE_OPERATORS = "\u2061\u2062\u2063\u2064"  # they stand for products and sums
END_OF_TEXT = re.compile(
    r"</?s>|<[|\uff5c][^<>|\uff5c\s]{1,40}[|\uff5c]>|<(?:eos|bos|pad|(?:start|end)_of_(?:turn|text))>|\[(?:/?INST|EOS)\]",
    re.IGNORECASE,
)
_VULGAR = re.compile(r"[\u00bc-\u00be\u2150-\u215e\u2189](?!\d)")
_TAGS = re.compile(r"</?(?:b|strong|i|em|u|code|mark|answer|span|p)>", re.IGNORECASE)
_EMPHASIS = re.compile(r"(?<![\w*`)])(\*{1,3}|_{1,3}|`{1,3})(?![\s*_`])([^*_`]*[^\s*_`])\1(?![\w*`(])")
_DOLLARS = re.compile(r"(?<![\d.\\$])(\$\$?)([^$]*[^$\s\\])\1(?![\d$])")
_WRAPPER = re.compile(r"\\(?:boxed|fbox|mathbf|mathrm|textbf|textit|emph)\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_BRACKETS = (
    *(("(", ")", ","), ("[", "]", ","), ("{", "}", ",")),  # with a comma it may be a pair
    *(('"', '"', ""), ("'", "'", ""), ("\u201c", "\u201d", ""), ("\u2018", "\u2019", "")),
)
_SAYS = re.compile(
    r"(?:so|thus|hence|therefore)?,?\s*(?:the\s+)?(?:final\s+|correct\s+)?answer\s*(?:is\s*:?|:|=)\s*", re.I
)
_NAME = re.compile(r"=\s*|(?P<name>[^\W\d_]+(?:\s+[^\W\d_]+)*|\\[A-Za-z]+)\s*=\s*")
_SYMBOL = re.compile(r"[A-Za-z\u0391-\u03c9]|\\[A-Za-z]+")

# How a number looks.
_CURRENCY = r"(?:(?:US|A|C|CA|AU|NZ|HK|S)?\$|[\u00a2\u00a3\u00a5\u0e3f\u20a0-\u20c0])"
_DIGITS = (
    rf"(?:\d{{1,3}}(?:,\d{{3}})+(?![\d,])|\d{{1,3}}(?:{_THIN}\d{{3}})+(?!\d)|\d{{1,3}}(?:['\u2019]\d{{3}})+(?!\d)"
    r"|\d{1,2}(?:,\d{2})+,\d{3}(?![\d,])|\d+)"
)
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b"
_LOWERED = str.maketrans(_RAISED, "0123456789+-")
_NUMBER = re.compile(
    rf"""(?P<outer>[-+]?)\s*{_CURRENCY}?\s*(?P<inner>[-+]?)\s*
    (?:(?P<whole>{_DIGITS})\s+(?P<part>\d+/\d+)
     | (?P<above>{_DECIMAL})\s*/\s*(?P<below>{_DECIMAL})
     | (?P<decimal>{_DECIMAL})
       (?:[eE](?P<exponent>[-+]?\d{{1,4}})(?![\w.])
        | \s*(?:[*xX\u00d7\u00b7\u22c5]|\\times|\\cdot)\s*10
          (?:\^(?P<power>[-+]?\d{{1,4}}|\{{[-+]?\d{{1,4}}\}})|(?P<raised>[{_RAISED}]{{1,5}}))
          (?![\w.^]))?)
    (?P<rest>.*)""",
    re.VERBOSE | re.DOTALL,
)

# What may follow a number: a unit or plain words, none of which scales it, combines it or compares it.
_LENGTH_POWER = re.compile(
    r"(?<![^\W\d_])((?:mm|cm|dm|m|km|in|ft|yd|mi|inch|inches|foot|feet|yards?|miles?|met(?:er|re)s?|units?|s|sec))"
    r"(?:\^?[23]|\^\{[23]\}|[\u00b2\u00b3])(?![\w.^])"
)
_SIGN_OF_UNIT = re.compile(rf"\s*(?:%|\u00b0|{_CURRENCY})")
_LETTERS = r"[A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f]+"
_KNOWN = "元圆円个個人名本枚年月日天원개명"
_ROUBLES = r"\u0440\u0443\u0431(?:\u043b\u044c|\u043b\u044f|\u043b\u0435\u0439)?"
_WORD = re.compile(rf"{_LETTERS}(?:['\u2019]{_LETTERS})*|{_ROUBLES}|[{_KNOWN}]")
_PHRASE = re.compile(rf"(?:(?:\s*[/(,;:]\s*|\s+|-|(?<=[.)\"])\s*|^)(?:{_WORD.pattern})[.)\"]*)+", re.DOTALL)
_SHORT = re.compile(
    r"""mm | cm | dm | m | km | in | ft | yd | mi | g | gm | kg | mg | lb | oz | t | l | L | ml | dl | cl |
    gal | pt | qt | h | hr | d | wk | yr | s | ms | ns | w | W | kw | V | A | N | J | C | F | hz | GB | MB |
    KB | kB | TB | sq | cu | px | pm | am | c | p | rs | of | a | an | at | on | by | is | it | he | we | us
    | my | st | nd | rd | th | as | so | if | ha | ac""",
    re.VERBOSE,
)
_ORDINALS = (
    "third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|teenth|tieth|hundredth|thousandth|illionth"
)
_SCALING = re.compile(
    rf"""\w*illions? | \w*illiards? | hundreds? | thousands? | lakhs? | lacs? | crores? | myriads? | googols? |
    dozens? | gross | scores? | grand | k | (?-i:MM) | mln | mn | mio | mrd | bn | tn | trn | mil | mille | mila
    | tausend | mill[o\u00f3]n(?:es)? | dutzend | docenas? | douzaines? | basis | ppm | ppb | permille | kilo | mega |
    giga | hal[fv](?:e?s|ed)? | quarters? | \w*(?:{_ORDINALS})s? | halb\w* | drittel | viertel | medi[oa]s? |
    mitad | tercios? | demi\w* | \w*fold | pi | tau | phi | infinit\w* | inf | nan | squared | cubed | factorial
    | powers? | roots?""",
    re.VERBOSE | re.IGNORECASE,
)
_COMBINING = re.compile(
    r"""point | plus | minus | times | multipl(?:y|ied|ying) | divid\w+ | over | add(?:ed|s)? | subtract\w* | sum |
    product | difference | quotient | ratio | mod | modulo | modulus | log | ln | lg | exp | sqrt | cbrt | sin |
    cos | tan | choose | div | gcd | lcm | abs | floor | ceil\w* | twice | thrice | doubled? | tripled? |
    quadrupled? | base | binary | hex\w* | octal | negative | and | or | und | oder | et | ou | to | through |
    thru | till | until | between | versus | vs | not | no | nor | never | neither | \w+n['\u2019]t | wrong |
    incorrect | false | without | except\w* | excluding | but | remainder | than | least | most | more | less |
    fewer | greater | minim\w+ | maxim\w+ | under | above | below | beyond | exceed\w* | approx\w* | about |
    around | roughly | almost | nearly | circa | zero | two | three | four | five | six | seven | eight | nine |
    ten | eleven | twelve | (?:thir|four|fif|six|seven|eigh|nine)teen |
    (?:twen|thir|for|fif|six|seven|eigh|nine)ty""",
    re.VERBOSE | re.IGNORECASE,
)


def first_after_marker(text: str, marker: str = "####") -> str | None:
    """Returns the text after the first `marker`, up to the end of its line.

    Returns:
        The text without white space around it; None where there is no marker, or nothing after it on its line.
    """
    _, found, after = text.partition(marker)
    line = after.partition("\n")[0].strip()
    return line if found and line else None


def canonical_number(text: str, *, units: bool = True) -> str | None:
    r"""Returns the canonical form of a number, exact at any size: `$1,080.50` and `1080.5 dollars` become `1080.5`.

    Markup around the number (`**72**`, `$\boxed{72}$`, `x = 72`, an end-of-text token), commas and narrow spaces
    between thousands, currency and percent signs, a unit, a dot at the end, a plus sign and needless zeros are removed;
    the minus sign never is. Digits of any script are read. Fractions (`2/4`, `\frac{2}{4}`), mixed numbers and
    powers of ten (`1e3`, `1.5 x 10^3`) become decimals where that is exact, else reduced fractions: `1 1/3` is `4/3`.

    Args:
        text: Text of one number, with or without a unit. `10-20`, `3 apples and 4 pears`, `42 + x`, `5:30`, `1,2`,
            `5 million`, `5 or more` and `0.33...` are not accepted as numbers: a wrong answer must not pass for a right
            one.
        units: Whether words may follow the number. Without, `5x` is not a number.

    Returns:
        `-?[0-9]+`, with a decimal part that does not end in 0, or with a denominator; None for anything else.
    """
    text = _bare(text)
    latex = re.search(r"[\\{}]", text)
    if latex:
        text, words = _split_words(_FRACTION.sub(_slashed, _plain_latex(text)).strip(" " + _THIN))
        if words is None:
            return None
        units = units and not re.search(r"[\\{}]", text) and not words
    match = _NUMBER.fullmatch(text)
    if match is None or (match["outer"] and match["inner"]) or not _harmless(match["rest"], units):
        return None
    negative = "-" in (match["outer"], match["inner"])
    if match["decimal"] is not None:
        power = (match["raised"] or "").translate(_LOWERED) or match["exponent"] or match["power"]
        magnitude = _shifted(match["decimal"], power)
    elif match["whole"] is not None:
        magnitude = _mixed(match["whole"], *match["part"].split("/"))
    else:
        magnitude = _fraction(match["above"], match["below"])
    if magnitude is None or magnitude == "0":
        return magnitude
    return "-" + magnitude if negative else magnitude


def _clean(text: str) -> str:
    """Returns a text up to its end-of-text token, with ASCII digits and signs, and without invisible characters."""
    ends = (match.start() for match in END_OF_TEXT.finditer(text) if text[: match.start()].strip())
    text = END_OF_TEXT.sub("", text[: next(ends, len(text))])
    if not text.isascii():
        text = "".join(map(_same, text))
        text = _VULGAR.sub(lambda match: f" {unicodedata.normalize('NFKC', match[0])}".replace("\u2044", "/"), text)
    return text


def _same(character: str) -> str:
    if character.isascii():
        return character
    code = ord(character)
    if code in _SAME:
        return _SAME[code]
    kind = unicodedata.category(character)
    if kind == "Nd":
        return str(unicodedata.decimal(character))
    if kind == "Zs":
        return _THIN
    return "" if kind == "Cf" and character not in _INVISIBLE_OPERATORS else character


def _bare(text: str) -> str:
    """Returns a text without markup, brackets around all of it, and what says that it is the answer."""
    text = _TAGS.sub(" ", re.sub(r"[ \t\r\n]+", " ", _clean(text)))
    text = re.sub(r"\\[()\[\]]", " ", text)
    before = None
    while text != before:
        before = text
        text = _EMPHASIS.sub(r"\2", _DOLLARS.sub(r"\2", _WRAPPER.sub(r" \1 ", text)))
        text = text.strip(" *_`" + _THIN).rstrip("\\ ")
        text = re.sub(r"(?<!\.)[.,;:]$", "", text) if not text[:-1].endswith("\u2026") else text
        said = _SAYS.match(text) or _NAME.match(text)
        if said and _may_be_named(said):
            text = text[said.end() :]
        for opening, closing, kept in _BRACKETS:
            inner = text[1:-1]
            if text.startswith(opening) and text.endswith(closing) and not set(inner) & set(opening + closing + kept):
                text = inner
    return text


def _may_be_named(said: re.Match[str]) -> bool:
    name = said.groupdict().get("name")
    return (
        not name or _SYMBOL.fullmatch(name) is not None or all(len(word) > 1 and _plain(word) for word in name.split())
    )


def _plain(word: str) -> bool:
    """Returns whether a word neither changes the number before it nor is an unknown symbol."""
    if _SCALING.fullmatch(word) or _COMBINING.fullmatch(word):
        return False
    known = word in _KNOWN or _SHORT.fullmatch(word.lower() if len(word) == 2 else word) is not None
    return len(word) > 2 or known


def _harmless(rest: str, units: bool) -> bool:
    rest = _SIGN_OF_UNIT.sub("", rest, count=1) if _SIGN_OF_UNIT.match(rest) else rest
    rest = re.sub(r"(?<![.\u2026])\.$", "", rest.rstrip())
    if not rest:
        return True
    if not units or rest.endswith(".."):
        return False
    if re.match(r"x\s", rest):  # `5x as many`
        rest = rest[1:]
    rest = _LENGTH_POWER.sub(r"\1", rest).replace("left over", "left")
    words = _WORD.findall(rest)
    if not words:
        return not rest.strip()
    if not _PHRASE.fullmatch(rest) or any(unicodedata.numeric(sign, None) is not None for sign in rest):
        return False
    joined = rest[0] in "-/" and len(words[0]) == 1  # `5-m` is a difference, `5/h` a quotient
    return all(map(_plain, words)) and not joined and words[-1] != "a" and not re.match(r"a\b", rest)


def _plain_decimal(text: str) -> str:
    whole, _, part = re.sub(r"[^\d.]", "", text).partition(".")
    part = part.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{part}" if part else "")


def _shifted(text: str, power: str | None) -> str | None:
    """Returns a decimal times a power of ten, by moving its point."""
    number = _plain_decimal(text)
    places = int(power.strip("{}")) if power else 0
    if not places:
        return number
    if abs(places) > _LONGEST:
        return None
    whole, _, part = number.partition(".")
    digits = "0" * max(0, -places) + whole + part + "0" * max(0, places)
    point = len(whole) + max(0, -places) + places
    return _plain_decimal(f"{digits[:point]}.{digits[point:]}")


def _mixed(whole: str, above: str, below: str) -> str | None:
    whole, above, below = map(_plain_decimal, (whole, above, below))
    if max(map(len, (whole, above, below))) > _LONGEST or int(above) >= int(below):  # `2 3/2` may be a product
        return None
    return _shortest(int(whole) + Fraction(int(above), int(below)))


def _fraction(above: str, below: str) -> str | None:
    above, below = _plain_decimal(above), _plain_decimal(below)
    if below == "0" or max(map(len, (above, below))) > _LONGEST:
        return None
    return _shortest(Fraction(above) / Fraction(below))


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


def numbers_in(text: str) -> Iterator[tuple[str | None, str]]:
    """Yields the numbers of a running text, each with the text after it.

    A calculation such as `3 * 4 = 12` is one number, the one after its last equals sign.

    Returns:
        Numbers as `canonical_number` writes them; None for one that cannot be read whole, such as the `5` of `5
        million`, `5 or 6`, `5:30` and `5 * 6`.
    """
    text = _clean(text).replace("\u2014", " ")
    for match in _NUMERAL.finditer(text):
        rest = text[match.end() :]
        said = match[0].rpartition("=")[2] if re.search(r"=\s*\S*\d", match[0]) else match[0]
        said = re.sub(r"^[^\W\d_]+:", "", said).strip(" ()[]{}\"'\u201c\u201d\u2018\u2019*_`")
        if said[:1].isalpha() and not re.match(_CURRENCY, said):
            continue  # `COVID-19`
        unread = said.endswith(("..", "\u2026")) or _CHANGED.match(rest)
        yield None if unread else canonical_number(said.rstrip(".,;:!?)]}\"'*_`\u201d\u2019")), rest


_NUMERIC = r"[\d\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2089\u2150-\u218b]"
_ATTACHED = rf"(?:[-+]?{_CURRENCY}[ \t]+)?[^ \t\r\n]*{_NUMERIC}[^ \t\r\n]*"
_NUMERAL = re.compile(
    rf"(?:(?:^|(?<=[=:(]))\s*[-+][ \t]+)?{_ATTACHED}"
    rf"(?:(?<![.,;:!?])[ \t]+(?:(?:[-+*/x\u00d7\u00f7\u00b7=^][ \t]+)+{_ATTACHED}|\d+/\d+(?!\S*\d)\S*))*"
)
_CHANGED = re.compile(
    rf"[ \t]*-?[ \t]*(?:(?:{_SCALING.pattern})\b|and\s+(?:(?:a|an|one|\d+/)\s*)?(?:hal|quarter|\w*(?:{_ORDINALS}))"
    rf"|and\s+\d+/\d|(?:or|to|plus|minus|times|over|divided\s+by|multiplied\s+by)\s+{_CURRENCY}?\d)",
    re.VERBOSE | re.IGNORECASE,
)


_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{|\s|[\d.+-])")
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_CLOSERS = re.compile(r"[^\n]*(?:\n[ \t]*(?:\\\]|\$\$|\\end\{[^{}\n]*\})[^\n]*)*")


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


_SPACES = re.compile(r"\\[,;: ]|~")
_TEXT = re.compile(r"\\(?:text|textrm|mbox)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[cdt]?frac\s*(?:\{\s*([-+\d.,]+)\s*\}|(\d))\s*(?:\{\s*([\d.,]+)\s*\}|(\d))")


def latex_number(text: str) -> str | None:
    r"""Applies `canonical_number` to a number in LaTeX: `\frac{7}{2}`, `-1\frac12`, `\$32,\!348`, `90^\circ`, `5\text{
    cm}`.

    Returns:
        The canonical number; None for anything that is not one number, such as `2\sqrt3`, `5x`, `101_2` or `(1,2)`.
    """
    return canonical_number(text, units=False)


def _plain_latex(text: str) -> str:
    """Returns a text without the LaTeX that does not change its meaning."""
    text = re.sub(
        r"\\left(?![A-Za-z])|\\right(?![A-Za-z])|\\displaystyle(?![A-Za-z])|\\!|\{\}", "", text.replace("{,}", ",")
    )
    text = re.sub(r"\^\{?\\circ\}?|\\(?:circ|degree)(?![A-Za-z])", "\u00b0", text)
    text = _SPACES.sub(_THIN, text)
    return re.sub(r"\\([%$])", r"\1", text).strip(" " + _THIN)


def _slashed(match: re.Match[str]) -> str:
    return f" {match[1] or match[2]}/{match[3] or match[4]} "


def _split_words(text: str) -> tuple[str, str | None]:
    r"""Returns a number and the words in `\text{...}` after it; None instead of words that are no unit."""
    found = _TEXT.search(text)
    if found is None:
        return text, ""
    if not text[: found.start()].strip() and found.end() == len(text):
        return found[1].strip(), ""
    words = found[1] + text[found.end() :]
    if found[1].strip() and canonical_number(f"1 {words}") is None:
        return text, None
    return text[: found.start()].strip(" " + _THIN), words


def canonical_latex(text: str) -> str:
    """Returns a number as `latex_number` writes it, and any other expression without markup, white space and LaTeX that
    do not change its meaning.
    """
    number = latex_number(text)
    return re.sub(r"\s+", "", plain_expression(text)) if number is None else number


def plain_text(text: str) -> str:
    """Returns a text without markup, a dot at the end, and differences of white space and case."""
    return " ".join(_bare(text).split()).strip(".").casefold()


def plain_expression(text: str) -> str:
    """Returns a text without markup and without the LaTeX that does not change its meaning."""
    return _plain_latex(_bare(text))
