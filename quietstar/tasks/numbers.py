"""The answers of mathematical problems: finding them in a text, writing them in one canonical way, and comparing them.

A number is read whole or not at all: words beside it have to be a known unit, a plural or plain words. Expressions are
compared exactly, by sympy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

from quietstar.tasks.file_task import TAGS, THIN, clean, plain_latex, slashed, without_brackets, without_markup
from quietstar.tasks.file_task import first_after_marker as first_after_marker
from quietstar.tasks.file_task import last_box as last_box
from quietstar.tasks.file_task import through_box as through_box

_DEEPEST = 12
_LONGEST = 4000  # Python refuses to convert longer integers; decimals of any length need no conversion

_SAYS = re.compile(
    r"(?:so|thus|hence|therefore)?,?\s*(?:(?:the|my|our)\s+)?(?:final\s+|correct\s+)?answer\s*(?:is\s*:?|:|=)\s*", re.I
)
_LETTER = r"(?:[A-Za-z\u0391-\u03c9]|\\[A-Za-z]+)"
_INDEX = r"(?:_\w|_\{[\w,]{1,9}\})?'{0,3}"
_POINTS = r"(?:[A-Z]'?){1,4}"
_SYMBOL = re.compile(  # `x`, `x_1`, `f(3)`, `P(A)`, `|x|`, `AB`, `m\\angle ABC`; of small letters, `ab` is a product
    rf"{_LETTER}{_INDEX}|[A-Zfghpq]{_INDEX}\([^()=]{{1,20}}\)|\|{_LETTER}{_INDEX}\||{_POINTS}"
    rf"|(?:m\s*)?\\(?:angle|measuredangle)\s*{_POINTS}|\\overline\s*\{{{_POINTS}\}}|\[{_POINTS}\]"
)
_NAME = re.compile(
    rf"=\s*|(?P<name>{_SYMBOL.pattern}|[^\W\d_]++(?:\s++[^\W\d_]++)*+|\\text\s*\{{[^{{}}]*\}})\s*[=:]\s*"
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# How a number looks.
_CURRENCY = (
    r"(?:(?:US|A|C|CA|AU|NZ|HK|S|R|MX|NT)?\$|[\u00a2\u00a3\u00a5\u0e3f\u20a0-\u20c0]"
    r"|(?:USD|EUR|GBP|JPY|CNY|RMB|INR|CAD|AUD|NZD|CHF|SEK|NOK|DKK|PLN|MXN|BRL|ZAR|KRW|SGD|HKD|Rs\.?|kr)(?![^\W\d_]))"
)
_DIGITS = (
    rf"(?:[1-9]\d{{0,2}}(?:(?:,\d{{3}})+(?![\d,])|(?:{THIN}\d{{3}})+(?!\d)|(?:['\u2019]\d{{3}})+(?!\d))"
    r"|[1-9]\d?(?:,\d{2})+,\d{3}(?![\d,])|\d+)"  # `0,123` has a decimal comma
)
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b"
_LOWERED = str.maketrans(_RAISED, "0123456789+-")
_NUMBER = re.compile(
    rf"""(?P<outer>[-+]?)\s*(?P<currency>{_CURRENCY})?\s*(?P<inner>[-+]?)\s*
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

# What may follow a number: a unit or a noun, and plain words around it. Every other word is refused.
_LENGTH_POWER = re.compile(
    r"(?<![^\W\d_])((?:mm|cm|dm|m|km|in|ft|yd|mi|inch|inches|foot|feet|yards?|miles?|met(?:er|re)s?|units?|s|sec))"
    r"(?:\^?[23]|\^\{[23]\}|[\u00b2\u00b3])(?![\w.^])"
)
_SIGN_OF_UNIT = re.compile(rf"\s*(?:%|\u00b0|{_CURRENCY})")
_WORD = r"[^\W\d_]++(?:['\u2019][^\W\d_]++)*+"
_STEP = re.compile(rf"(\s*+[/(,;:]\s*+|\s++|-|(?<=[.)\"])|^)({_WORD})[.)\"]*+")
_SYMBOLS = _words(
    """m g s h l L V W J C F mm cm dm km in ft yd mi gm kg mg lb lbs oz fl ml mL dl cl gal pt pts qt hr hrs wk wks yr
    yrs mo ms ns kw kW Wh kWh mAh Hz hz kHz MHz GHz kJ kPa GB MB KB kB TB Mbps mph kph km\u00b2 sq cu px pm am rs
    min mins sec secs st nd rd th ha ac \u00b5m \u03bcm \u00b5g \u03bcg \u03a9 \u2126 \u00c5 cal kcal tsp tbsp rpm"""
)
_CURRENCIES = _words(
    """dollar buck cent euro penny pence pound quid sterling yen yuan rmb rupee rupiah peso real reais ruble rouble
    franc mark krone kronor kroner krona kr lira lire dinar dirham riyal rial shekel won baht dong ringgit rand
    zloty forint koruna pula kuna naira cedi shilling taka leu lei lev usd eur gbp jpy cny inr cad aud nzd chf sek
    nok dkk pln czk huf mxn brl zar krw sgd hkd zł kč \u0440\u0443\u0431 \u0440\u0443\u0431\u043b\u044c
    \u0440\u0443\u0431\u043b\u044f \u0440\u0443\u0431\u043b\u0435\u0439 元 圆 円 원"""
)
_UNITS = _CURRENCIES | _words(
    """inch inches foot feet yard mile league meter metre millimeter millimetre centimeter centimetre kilometer
    kilometre acre hectare gram gramme milligram kilogram ton tonne ounce stone liter litre milliliter millilitre
    gallon pint quart cup teaspoon tablespoon bushel second minute hour day night week fortnight month year decade
    century centuries degree millisecond radian celsius fahrenheit kelvin percent percentage pct knot watt kilowatt
    volt amp ampere joule newton pascal hertz calorie byte kilobyte megabyte gigabyte terabyte bit pixel unit point
    piece item pair couple person people child children man men woman women boy girl student kid adult friend tooth
    teeth mouse mice goose geese oxen fish goldfish sheep deer cattle dice loaf leaf page book box bag bottle can
    card coin ticket game apple egg cookie slice car tree dog cat bird step head clip ad ads way each apiece o'clock
    个 個 人 名 本 枚 年 月 日 天 개 명"""
)
_PLAIN = _words(
    """total altogether overall all left remaining old tall long wide deep high thick heavy away ago later earlier
    today tomorrow yesterday daily weekly monthly yearly annually together square cubic us american canadian
    australian british in on at for from during with he she they it his her their my your our its this that these
    those them him me you per a an of the every red blue green yellow white black brown pink purple gray grey orange
    big large small little medium full whole new distinct right possible different extra additional other fresh ripe
    male female baby young adult human hot cold ice chocolate vanilla pizza cheese bread meat chicken beef pork rice
    corn wheat flour sugar salt butter milk water juice coffee tea oil gas paper wood wooden metal plastic glass
    gold silver ribbon candy fruit vegetable potato tomato lemon banana jelly pie cake cupcake birthday toy tennis
    baseball basketball football trading gift playing cream soccer video computer phone math school home work class
    team family food time money space land grass flower rose pizza pencil pen notebook shoe shirt"""
)
_LEADING = _words("per a an of the every on at for from during with his her their my your our this that")
_COUNTED = "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen"
_CHANGING = re.compile(
    rf"""(?:zero|nought|one|{_COUNTED})(?:e?s)? | (?:twen|thir|for|fif|six|seven|eigh|nine)t(?:y|ies)
    | \w*(?:third|fourth|fifth|sixth|seventh|eighth|nine?th|tenth|eleventh|twelfth|teenth|tieth|redth|sandth|lionth)s?
    | first | hal[fv]\w* | quarters? | tercios? | medi[oa]s? | \w*fold | dozens? | scores? | baker['\u2019]?s
    | \w*[^\Waeiou]il(?:l?i|l?j|l?y|h|ij)[oua]\w* | (?:m|b|tr)ill(?:on|ar)\w* | mil(?:le)?s | mill?iers? | mills?
    | \w*hundr\w* | \w*hundert\w* | \w*honderd\w* | \w*duizend\w* | \w*tus[ei]nd?\w* | ciens | jutas | \w*cientos
    | \w*[cz]entos | centaines | \w+aines | docenas | thousand\w* | \w*tausend\w* | lakhs? | lacs? | crores?
    | myriads? | thous? | thsds? | [kg]['\u2019]s | basis | bps
    | (?:eins|sechs|trois|vingts|dos|tres|seis|dois|seks|treds|firs|viens?|vienas|trys|simts|\w*belas) | point
    | plus(?:es)? | minus(?:es)? | times | multipl(?:y|ied|ying) | divi[ds]\w+ | over | add(?:ed|s|ing|itions)?
    | subtract\w* | sums? | product | differences? | quotients? | ratios? | mod(?:ulo|ulus|uli)? | logs? | logarithms?
    | ln | lg | exp | exponent\w* | sqrt | cbrt | a?(?:rc)?(?:sin|cos|tan|cot)e?s? | choose | div | gcd | lcm | abs
    | floor | ceil\w* | twice | thrice | (?:doubl|trebl|tripl|quadrupl|quintupl)\w* | base | binary | hex\w* | neg
    | negat\w+ | inverses? | opposites? | reciprocals? | complements? | conjugates? | squared? | cubed? | factorials?
    | powers? | roots? | raised | pi | infinit\w* | inf | nan | and | or | und | oder | et | ou | to | through | thru
    | till | until | between | vs | versus | not | no | nor | never | neither | none | cannot | \w+n['\u2019]t
    | wrong\w* | mistak\w+ | incorrect\w* | false\w* | invalid | without | except\w* | exclu\w+ | reject\w* | but
    | remainders? | than | least | most | more | less | fewer | greater | larger | smaller | bigger | higher | lower
    | longer | shorter | minim\w* | max\w* | under | above | below | beyond | exceed\w* | excess\w* | approx\w*
    | about | around | roughly | almost | nearly | barely | hardly | several | many | few | unless | \w+wards | tops
    | short\w* | off | up | deficits? | debts? | owe[ds]? | owing | loss(?:es)? | lost | overdr\w+ | arrears
    | deduct\w* | reduc\w+ | decreas\w+ | increas\w+ | diminish\w* | debit\w* | besides | equals | gives | always
    | perhaps | sometimes | afterwards | gross(?:es)? | octals | differs | positives | per[cm]?il(?:le|s)?""",
    re.VERBOSE | re.IGNORECASE,
)
_FUNCTION = r"\\(?:sin|cos|tan|cot|sec|csc|log|ln|lg|exp|sqrt|frac|det|max|min|lim|gcd|text|arc\w+|not|neg|pm|mp)"
_ANSWER = _words("the my our final correct answer result value total is")
_NAMES = _words(
    """cost price number amount time distance speed age area volume perimeter length width height weight mass profit
    revenue income salary change budget money quantity count average mean median mode rate tax probability angle side
    radius diameter fee bill tip required needed current combined"""
)


def canonical_number(text: str, *, units: bool = True, symbols: bool = True) -> str | None:
    r"""Returns the canonical form of a number, exact at any size: `$1,080.50` and `1080.5 dollars` become `1080.5`.

    Markup around the number (`**72**`, `$\boxed{72}$`, `x = 72`, an end-of-text token), commas and narrow spaces
    between thousands, currency and percent signs, a unit, a dot at the end, a plus sign and needless zeros are removed;
    the minus sign never is. Digits of any script are read. Fractions (`2/4`, `\frac{2}{4}`), mixed numbers and
    powers of ten (`1e3`, `1.5 x 10^3`) become decimals where that is exact, else reduced fractions: `1 1/3` is `4/3`.

    Args:
        text: Text of one number, with or without a unit. `10-20`, `3 apples and 4 pears`, `42 + x`, `5:30`, `1,2`,
            `5 million`, `5 or more` and `0.33...` are no numbers: a wrong answer must not pass for a right one.
        units: Whether words may follow the number. Without, `5x` is not a number.
        symbols: Whether a symbol and an equals sign may stand before it, as in `x = 5`.

    Returns:
        `-?[0-9]+`, with a decimal part that does not end in 0, or with a denominator; None for anything else.
    """
    match, _ = _parts(text, units, symbols) or (None, "")
    if match is None:
        return None
    negative = "-" in (match["outer"], match["inner"])
    if match["decimal"] is not None:
        power = (match["raised"] or "").translate(_LOWERED) or match["exponent"] or match["power"]
        magnitude = _shifted(match["decimal"], power)
    elif match["whole"] is not None:
        magnitude = _mixed(match["whole"], *match["part"].split("/"))
    else:
        magnitude = _fraction(match["above"], match["below"])
    return f"-{magnitude}" if negative and magnitude not in (None, "0") else magnitude


def _parts(text: str, units: bool, symbols: bool) -> tuple[re.Match[str], str] | None:
    """Returns the match of a number with what belongs to it, and the words in LaTeX behind it."""
    text, words = _bare(text, symbols), ""
    if re.search(r"[\\{}]", text):
        text, latex_words = _split_words(slashed(plain_latex(text)).strip(" " + THIN))
        if latex_words is None:
            return None
        words = latex_words
        units = units and not re.search(r"[\\{}]", text) and not words
    match = _NUMBER.fullmatch(text)
    if match is None or text.endswith("..") or (match["outer"] and match["inner"]):
        return None
    return (match, words) if _harmless(match["rest"], units, match["currency"] is not None) else None


def beside_number(text: str) -> str:
    """Returns what stands beside a number, such as its currency and unit; nothing where the text is no number."""
    found = _parts(text, units=True, symbols=True)
    return "" if found is None else f"{found[0]['currency'] or ''} {found[0]['rest']} {found[1]}".strip()


def _bare(text: str, symbols: bool = True) -> str:
    """Returns a text without markup (`_DEEPEST` deep), brackets around it, and what says that it is the answer."""
    text = re.sub(r"\s++", lambda gap: gap[0] if gap[0] == THIN else " ", clean(text))
    text = whole = TAGS.sub(" ", re.sub(r"\\[()\[\]]", " ", text))
    for _ in range(_DEEPEST):
        before = text
        text = without_markup(text)
        text = text.strip(" *_`" + THIN).rstrip("\\ ")
        text = re.sub(r"(?<!\.)[.,;:]$", "", text) if not text[:-1].endswith("\u2026") else text
        said = _SAYS.match(text) or _NAME.match(text)
        if said and _may_be_named(said.groupdict().get("name"), symbols and "=" in said[0]):
            text = text[said.end() :]
        text = without_brackets(text)
        if text == before:
            return text
    return whole


def _may_be_named(name: str | None, symbols: bool) -> bool:
    """Returns whether what stands before an equals sign is the name of the number behind it, and no part of it."""
    if not name or (_SYMBOL.fullmatch(name) and not (re.match(_FUNCTION, name) or _changes(name))):
        return symbols or not name
    words = re.sub(r"^\\text\s*\{([^{}]*)\}$", r"\1", name).lower().split()
    if not symbols:  # a name by which answers differ
        return _ANSWER.issuperset(words)
    known = _NAMES | _ANSWER | (_PLAIN - {"square", "cubic"})
    return all(word in known or _is_noun(word) for word in words)


def _changes(word: str) -> bool:
    """Returns whether a word scales, combines, compares or denies the number beside it."""
    return _CHANGING.fullmatch(word) is not None


def _is_noun(word: str) -> bool:
    """Returns whether a word is a known unit, or a plural that does not change the number before it."""
    word = re.sub(r"['\u2019]s$|(?<=s)['\u2019]$", "", word)
    small = word.lower()
    plural = len(word) > 3 and word.isascii() and word.endswith("s") and not word.endswith(("ss", "us", "is"))
    known = word in _SYMBOLS or small in _UNITS or small.removesuffix("s") in _UNITS
    return (known or plural) and not _changes(word)


def _harmless(rest: str, units: bool, currency: bool = False) -> bool:
    """Returns whether the text behind a number, perhaps after a currency, is nothing, or a unit with plain words."""
    sign = _SIGN_OF_UNIT.match(rest)
    if sign:
        currency = currency or sign[0].strip() not in "%\u00b0"
        rest = rest[sign.end() :]
    rest = re.sub(r"(?<![.\u2026])\.$", "", rest.rstrip())
    if not rest or not units:
        return not rest
    rest = _LENGTH_POWER.sub(r"\1", re.sub(r"^x as (?:many|much)\b", "", rest)).replace("left over", "left")
    place, before = 0, ""
    while place < len(rest):
        step = _STEP.match(rest, place)
        if step is None:
            return False
        place, gap, word = step.end(), step[1].strip(), step[2]
        small, symbol = word.lower(), word in _SYMBOLS
        per = gap == "/" or before in ("per", "a", "an")
        if gap in ("-", "/") and len(word) == 1 and not (before and gap == "/"):  # `5-m`, `5/h` are calculations
            return False
        if symbol and currency and not per and small not in ("in", "rs"):  # `$5m` is five million
            return False
        if before in _SYMBOLS and (small.removesuffix("s") in _CURRENCIES or (len(before) == 1 and not gap)):
            return False  # and so is `5m dollars`
        if not (_is_noun(word) or small in _PLAIN) or (small == "a" and not step[1]):
            return False
        before = word if symbol else small
    return before not in _LEADING


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
    if max(abs(places), len(number)) > _LONGEST:
        return None
    return _shortest(Fraction(number) * Fraction(10) ** places)


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


def numbers_in(text: str) -> Iterator[tuple[str | None, bool]]:
    """Yields the numbers of a running text, each with whether more text could not change it.

    A calculation such as `3 * 4 = 12` is one number, the one after its last equals sign. The words beside a number
    change it as they do for `canonical_number`; a sentence may go on behind it and its unit.

    Returns:
        Numbers as `canonical_number` writes them; None for one that cannot be read whole, such as the `5` of `5
        million`, `minus 5`, `5 or 6`, `5:30`, `5 000` and `5 * 6`.
    """
    text = clean(text).replace("\u2014", " ")
    tokens = _TOKEN.findall(text)
    place = 0
    while place < len(tokens):
        start, place = place, place + 1
        if not _NUMERIC.search(tokens[start]):
            continue
        while (more := _operand(tokens, place)) is not None:
            place = more
        said = re.sub(r"^[^\W\d_]+:", "", " ".join(tokens[start:place]))
        formula, _, value = said.rpartition("=")
        for _ in range(2):
            if start and re.fullmatch(rf"[-+]|[-+(]?{_CURRENCY}", tokens[start - 1]):
                start -= 1
                said = f"{tokens[start]} {said}"
        number = _shown(value if formula else said)
        if number == "":  # a name such as `COVID-19`
            continue
        if not (_is_formula(formula) if formula else _may_precede(tokens[max(0, start - 8) : start], tokens[start])):
            number = None
        if not formula and _is_second(tokens[max(0, start - 4) : start]):
            number = None
        if tokens[place - 1][-1] in ",;" and _NUMERIC.search("".join(tokens[place : place + 1])):  # `5, 6`
            number = None
        behind = [] if tokens[place - 1][-1] in _ENDS else tokens[place : place + _WORDS_AFTER]
        if not _may_go_on(behind, re.search(_CURRENCY, said) is not None):
            number = None
        after = tokens[place : place + _WORDS_AFTER + 1]
        yield number, "\n" in after or len(after) + text[-1:].isspace() > _WORDS_AFTER


def _operand(tokens: list[str], place: int) -> int | None:
    """Returns the place behind the next part of the numeral that ends before `place`: `* 4`, `000` or `1/2`."""
    if tokens[place - 1][-1] in ".,;:!?":
        return None
    for _ in range(2):
        place += place < len(tokens) and _OPERATOR.fullmatch(tokens[place]) is not None
    place += place < len(tokens) - 1 and re.fullmatch(rf"[-+]?{_CURRENCY}", tokens[place]) is not None
    return place + 1 if place < len(tokens) and _NUMERIC.search(tokens[place]) else None


def _shown(said: str) -> str | None:
    """Returns a numeral of a running text as a number; empty for a name such as `COVID-19`."""
    braces = "" if "\\" in said else "{}"  # those of `\boxed{72}` are not around it
    said = said.strip(f" ()[]{braces}\"'\u201c\u201d\u2018\u2019*_`")
    if said[:1].isalpha() and not re.match(_CURRENCY, said):
        return ""
    return (
        None if said.endswith(("..", "\u2026")) else canonical_number(said.rstrip(f".,;:?)]{braces}\"'*_`\u201d\u2019"))
    )


def _is_formula(text: str) -> bool:
    """Returns whether what stands before an equals sign is a name or a calculation with numbers: `x`, but not `2x`."""
    if not _NUMERIC.search(text):
        return _may_be_named(text.strip(" ()[]{}\"'*_`$\\") or None, symbols=True)
    return re.search(r"[a-wyz](?![a-z])|x(?!\s*\d)", re.sub(rf"{_CURRENCY}|[a-z]{{2,}}", "", text)) is None


def _may_precede(tokens: list[str], first: str) -> bool:
    """Returns whether the words before a number leave it as it is: `minus 5`, `at most 5` and `5 of 6` do not."""
    clause = max((place for place, token in enumerate(tokens, start=1) if token[-1] in _ENDS), default=0)
    words = [token.strip(_AROUND).lower() for token in tokens[clause:]]
    if tokens and re.search(r"[!<>~\u2248\u2260]=|^[\\](?!boxed|fbox|[(\[]|text|mathbf)", tokens[-1]):
        return False
    if first in ("-", "+") and words and words[-1] not in ("=", *_VERBS):
        return False
    if words and words[-1] == "=":
        sentence = max((place for place, word in enumerate(words, start=1) if word in _GOING_ON), default=0)
        return _may_be_named(" ".join(words[sentence:-1]), symbols=True)
    while words and words[-1] in ("the", "a", "an", "of", "by", "just", "only", "exactly", ""):
        words = words[:-1]
    if not words or words[-1] == "and":
        return not any(map(_NUMERIC.search, words))
    if words[-1] in _VERBS or _COMES_TO.search(" ".join(words)):
        return True
    return words[-1][-1].isalpha() and not _changes(words[-1])


def _is_second(tokens: list[str]) -> bool:
    """Returns whether another number stands before one, perhaps with a unit: `5 feet, 6`, `5, 6`, `5 out of 6`."""
    found = _FIRST.search(" ".join([*tokens, ""])[-200:])  # the end of a longer one says the same
    unit = (found and found["unit"]) or ""
    return found is not None and (not unit or unit in _SYMBOLS | _UNITS or unit.lower().removesuffix("s") in _UNITS)


def _may_go_on(tokens: list[str], currency: bool) -> bool:
    """Returns whether the words behind a number are a unit or the rest of its sentence."""
    tokens = tokens[: tokens.index("\n")] if "\n" in tokens else tokens
    for place, token in enumerate(tokens):
        bare = token.strip("()[]{}\"'*_`.,;:!?\\")
        word, after = bare.lower(), [other.strip(_AROUND).lower() for other in tokens[place + 1 :]]
        unit = word not in _PLAIN and _harmless(bare if bare[:1] in "-/" else f" {bare}", True, currency)
        if token[0] in "([":  # a remark, unless it is `(thousand)`
            closed = next((end for end, other in enumerate(tokens) if end >= place and other[-1] in ")]"), len(tokens))
            said = [word, *after][: closed - place + 1]
            counted = re.fullmatch(_COUNTED, word) and len(said) == 1
            return bool(counted) or any(map(_NUMERIC.search, said)) or not any(map(_changes, said))
        if bare == "i" or token[0] == "!" or "{" in token or not (unit or word in _PLAIN | _GOING_ON):
            return False
        if token[-1] in ",;" and after and _NUMERIC.search(after[0]):
            return len(after) > 1 and not _is_noun(after[1])
        if not after or token[-1] in _ENDS + ")":
            return True
        if "and" in (word, after[0]):
            changes = any(_NUMERIC.search(other) or (_changes(other) and other != "and") for other in after)
            return not changes and after[-1] not in ("a", "an")  # `and a half`
        calculated = (_OPERATOR.fullmatch(after[0]) or after[0] in ("of", "per")) and _NUMERIC.search(
            "".join(after[1:])
        )
        if calculated or _changes(after[0]) or (word not in _GOING_ON and _NUMERIC.search(after[0])):
            return False
        if word not in _PLAIN:
            return True
    return True


_ENDS = ".,;:!?\n"
_AROUND = "()[]{}\"'\u201c\u201d\u2018\u2019*_`.,;:!?$\\"
_WORDS_AFTER = 3  # `1 and a half` is one number
_TOKEN = re.compile(rf"\n|(?:\S|{THIN})+")
_NUMERIC = re.compile(r"[\d\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2089\u2150-\u218b]")
_FIRST = re.compile(
    rf"{_NUMERIC.pattern}[^\s.:!?]*\s(?:(?P<unit>(?!in\b|per\b|out\b|of\b|the\b)[^\W\d_]+)[,;]?\s)?"
    r"(?:(?:in|per|out|of|the)\s)*$"
)
_OPERATOR = re.compile(r"[-+*/xX\u00d7\u00f7\u00b7=^<>\u2264\u2265\u2260\u2248~\u00b1|:]")
_VERBS = _words("is are was were be equals gives")
_GOING_ON = _VERBS | _words(
    """and because since so as which who where when if then while has have had will would can could should also too now
    here there again we i but not get thus hence therefore let find"""
)
_COMES_TO = re.compile(
    r"\b(?:equals?|equivalent|comes?|out|amounts?|simplifies|reduces|evaluates|(?:add|sum|come)s? up) to$"
)


_TEXT = re.compile(r"\\(?:text|textrm|mbox)\s*\{([^{}]*)\}")


def latex_number(text: str) -> str | None:
    r"""Applies `canonical_number` to a number in LaTeX, such as `-1\frac12` or `5\text{ cm}`; `5x` is none."""
    return canonical_number(text, units=False)


def _split_words(text: str) -> tuple[str, str | None]:
    r"""Returns a number and the words in `\text{...}` after it; None instead of words that are no unit."""
    found = _TEXT.search(text)
    if found is None:
        return text, ""
    if not text[: found.start()].strip() and found.end() == len(text):
        return found[1].strip(), ""
    words = found[1] + text[found.end() :]
    if found[1].strip() and not _harmless(f" {words}", units=True):
        return text, None
    return text[: found.start()].strip(" " + THIN), words


def canonical_latex(text: str) -> str:
    """Returns a number as `latex_number` writes it, and another expression without needless markup and white space."""
    number = latex_number(text)
    return number or re.sub(r"\s+(?![\w.])|(?<![\w.,])\s+", "", plain_expression(text))


def plain_text(text: str, *, symbols: bool = True) -> str:
    """Returns a text without markup, a dot at the end, needless white space, and perhaps its symbol."""
    text = " ".join(_bare(text, symbols).split()).strip(".")
    words = _TEXT.fullmatch(text)
    return words[1].strip() if words else text


def plain_expression(text: str, *, symbols: bool = True) -> str:
    """Returns a text without markup, the LaTeX that does not change its meaning, and perhaps its symbol and `=`."""
    return plain_latex(_bare(text, symbols))
