"""Text of unknown content as HTML: inert, and every character that would hide or reorder something made visible."""

from __future__ import annotations

import html
import re
import unicodedata

# Cc controls, Cf formats (bidi, zero width), Cs lone surrogates, Co and Cn without a meaning, Zl and Zp line breaks
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_SAFE = re.compile(r"[ !#-%(-;=?-~]*")  # printable ASCII without what HTML escapes

_SYMBOLS = {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW TO BAR}"}
_LINE_END = '<span class="space" title="U+000A">\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}</span>'


def visible(text: str, one_line: bool = False) -> str:
    """Text as HTML content; line ends and tabs show as symbols.

    Args:
        text: Anything, NUL and lone surrogates included.
        one_line: Line ends do not break the line besides.
    """
    if _SAFE.fullmatch(text):
        return text
    content = "".join(map(_visible_character, text))
    return content if one_line else content.replace(_LINE_END, f"{_LINE_END}\n")


def plain(text: str) -> str:
    """Text for an attribute or a `<title>`: as `visible`, without markup."""
    if _SAFE.fullmatch(text):
        return text
    return "".join(html.escape(_name(character) or character) for character in text)


def _visible_character(character: str) -> str:
    name = _name(character)
    if name is None:
        return html.escape(character)
    return (
        f'<span class="{"space" if character in _SYMBOLS else "hidden"}" title="U+{ord(character):04X}">{name}</span>'
    )


def _name(character: str) -> str | None:
    """What stands for a character that cannot be seen, None for one that can."""
    if unicodedata.category(character) not in _HIDDEN:
        return None
    return _SYMBOLS.get(character) or f"⟨U+{ord(character):04X}⟩"
