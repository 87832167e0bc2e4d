"""Answers as MATH has them: in a box, in LaTeX."""

from __future__ import annotations

import re

from quietstar.tasks.numbers import canonical_number

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{|\s|[\d.+-])")
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_CLOSERS = re.compile(r"[^\n]*(?:\n[ \t]*(?:\\\]|\$\$|\\end\{[^{}\n]*\})[^\n]*)*")
_NOISE = re.compile(r"\\[!,;: ]|\\(?:left|right)(?![A-Za-z])|\^\{?\\circ\}?|\\circ(?![A-Za-z])|\\?[%$]|(?<=\d)~(?=\d)")
_WORDS = re.compile(r"\\(?:text|textrm|textbf|mbox|mathrm|mathbf)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[cdt]?frac\s*(?:\{\s*([-+\d.,]+)\s*\}|(\d))\s*(?:\{\s*([\d.,]+)\s*\}|(\d))")


def last_box(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds, however deeply its braces are nested, or `\boxed 5` without braces.

    Returns:
        None where there is none, or it is not closed.
    """
    found = list(_BOX.finditer(text))
    place = _content(text, found[-1].end()) if found else None
    return None if place is None else text[slice(*place)].strip()


def through_box(text: str) -> str:
    r"""A text up to the line of the last box in its first paragraph that has a complete one; all of it without a box.

    That box is its answer, whatever other problems the text goes on to solve. A line that closes the formula around the
    box, such as `\]`, is kept.
    """
    places = [place for box in _BOX.finditer(text) if (place := _content(text, box.end())) is not None]
    if not places:
        return text
    blank = _BLANK_LINE.search(text, places[0][1])
    end = max(stop for start, stop in places if blank is None or start < blank.start())
    closers = _CLOSERS.match(text, end)
    return text if closers is None else text[: closers.end()]


def _content(text: str, start: int) -> tuple[int, int] | None:
    """From where to where the content of a box goes; None where it has none, or is not closed."""
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
    r"""`canonical_number` of a number in LaTeX: `\frac{7}{2}`, `-1\frac12`, `\$32,\!348`, `90^\circ`, `5\text{ cm}`.

    Returns:
        None for anything that is not one number, such as `2\sqrt3`, `5x`, `101_2` or `(1,2)`.
    """
    text = _NOISE.sub("", text.replace("{,}", ",")).strip().rstrip("\\").rstrip()
    words = _WORDS.search(text)
    if words is not None:
        if text[words.end() :].strip(" .^23{}") or (words[1].strip() and canonical_number(f"1 {words[1]}") is None):
            return None
        text = text[: words.start()].strip()
    return canonical_number(_FRACTION.sub(_slashed, text), units=False)


def canonical_latex(text: str) -> str:
    """A number as `latex_number` writes it; any other expression without what does not change its meaning."""
    number = latex_number(text)
    return re.sub(r"\s+", "", _NOISE.sub("", text)).rstrip(".") if number is None else number


def _slashed(match: re.Match[str]) -> str:
    return f" {match[1] or match[2]}/{match[3] or match[4]}"
