"""Whatever a text holds, it is text on the page, and nothing of it is hidden."""

from __future__ import annotations

import html
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quietstar.reporting.page import plain, visible

ANY = st.text(st.characters(exclude_categories=()))
OUR_MARKUP = re.compile(r'<span class="(?:hidden|space)" title="U\+[0-9A-F]{4,6}">|</span>\n?')


@given(ANY)
def test_nothing_but_our_own_markup_is_left(text: str) -> None:
    rest = OUR_MARKUP.sub("", visible(text))
    assert not set("<>\"'") & set(rest)
    assert not set("<>\"'") & set(plain(text))
    for content in (rest, plain(text)):
        content.encode("utf-8")
        hidden = [character for character in content if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl")]
        assert not hidden


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs", "M"])))
def test_what_can_be_seen_stays_as_it_is(text: str) -> None:
    assert html.unescape(visible(text)) == text == html.unescape(plain(text))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("</script>", "&lt;/script&gt;"),
        ("a\x00b", "a⟨U+0000⟩b"),
        ("\u202e", "⟨U+202E⟩"),
        ("\u200b\ufeff", "⟨U+200B⟩⟨U+FEFF⟩"),
        ("\ud800", "⟨U+D800⟩"),
        ("\r\n\t", "⟨U+000D⟩↵⇥"),
        ("\U000e0041", "⟨U+E0041⟩"),
        ("שלום 你好 \N{FAMILY}", "שלום 你好 \N{FAMILY}"),
    ],
)
def test_examples(text: str, wanted: str) -> None:
    assert plain(text) == wanted
    assert OUR_MARKUP.sub("", visible(text)) == wanted


def test_a_line_end_is_shown_and_ends_the_line() -> None:
    assert visible("a\nb") == 'a<span class="space" title="U+000A">↵</span>\nb'
    assert visible("a\nb", one_line=True) == 'a<span class="space" title="U+000A">↵</span>b'
