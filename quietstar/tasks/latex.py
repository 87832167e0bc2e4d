"""Answers as MATH has them: in a box, in LaTeX."""

from __future__ import annotations

import re

from quietstar.tasks.numbers import canonical_number

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{|\s|[\d.+-])")
_NOISE = re.compile(r"\\[!,;: ]|\\(?:left|right)(?![A-Za-z])|\^\{?\\circ\}?|\\circ(?![A-Za-z])|\\?[%$]|(?<=\d)~(?=\d)")
_WORDS = re.compile(r"\\(?:text|textrm|textbf|mbox|mathrm|mathbf)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[cdt]?frac\s*(?:\{\s*([-+\d.,]+)\s*\}|(\d))\s*(?:\{\s*([\d.,]+)\s*\}|(\d))")


def last_box(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds, however deeply its braces are nested, or `\boxed 5` without braces.

    Returns:
        None where there is none, or it is not closed.
    """
    found = list(_BOX.finditer(text))
    if not found:
        return None
    rest = text[found[-1].end() :].lstrip()
    if not rest.startswith("{"):
        return re.split(r"[\s$]", rest, maxsplit=1)[0].rstrip(".") or None
    depth = 0
    for match in re.finditer(r"\\.|[{}]", rest):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return rest[1 : match.start()].strip()
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
