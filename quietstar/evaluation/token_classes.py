"""What kind of token the text has at each place."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from quietstar.evaluation.token_texts import Texts

CLASSES = {
    "digit": "digits alone, with or without a space before them",
    "word": "begins a word: a letter, where the text before does not end in one",
    "continuation": "goes on with a word: a letter after a letter",
    "punctuation": "marks and symbols alone, with or without a space",
    "line end": "white space with a line end in it",
    "space": "other white space",
    "other": "parts of characters, special tokens, and mixtures that begin with none of the above",
}


def token_class(text: str, before: str) -> str:
    """One of `CLASSES`.

    Args:
        text: What the token spells, its leading space included.
        before: What the token before it spells.
    """
    if text and not text.strip():
        return "line end" if "\n" in text else "space"
    core = text.strip()
    if not core or "\N{REPLACEMENT CHARACTER}" in core:
        return "other"
    if core.isdigit():
        return "digit"
    if core[0].isalpha():
        inside = text[0] == core[0] and before[-1:].isalpha()
        return "continuation" if inside else "word"
    if not any(character.isalnum() for character in core):
        return "punctuation"
    return "other"


def token_classes(ids: Sequence[int], texts: Texts) -> list[str]:
    """The class of each token but the first.

    Args:
        ids: A text.
        texts: Of its tokenizer.
    """
    spelt = [texts.get(token, "") for token in ids]
    return [token_class(text, before) for before, text in pairwise(spelt)]
