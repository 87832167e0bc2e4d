"""What each token spells, whatever the tokenizer, and how a text becomes tokens.

What kind of token the text has at each place.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from string import ascii_letters

from transformers import PreTrainedTokenizerBase

from quietstar.errors import DataError

Texts = dict[int, str]
"""By token id; special tokens spell nothing."""


def token_texts(tokenizer: PreTrainedTokenizerBase) -> Texts:
    """The text that each token adds to what stands before it, its leading space included.

    A tokenizer that decodes a token alone may drop its space, so each is decoded behind another, usually a letter.
    Tokens that are a part of a character spell the replacement character.
    """
    special = set(tokenizer.all_special_ids)
    ids = sorted(set(tokenizer.get_vocab().values()))
    ordinary = [token for token in ids if token not in special]
    before = _letter(tokenizer, ordinary)
    if before is None:
        return {token: "" if token in special else decode(tokenizer, [token]) for token in ids}
    start = decode(tokenizer, [before])
    texts: Texts = dict.fromkeys(special, "")
    for token in ordinary:
        both = decode(tokenizer, [before, token])
        texts[token] = both[len(start) :] if both.startswith(start) else decode(tokenizer, [token])
    return texts


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text as it is: nothing is cleaned up or left out."""
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def encode(tokenizer: PreTrainedTokenizerBase, text: str, name: str | None = None) -> list[int]:
    """A text as the tokenizer begins one, with its special tokens in front and none behind.

    Args:
        tokenizer: The model's.
        text: Anything.
        name: Of the text, or its place; by default its beginning.

    Raises:
        DataError: The tokenizer cannot encode it.
    """
    try:
        ids = list(tokenizer(text, verbose=False)["input_ids"])
    except Exception as error:  # tokenizers raises plain Exception, e.g. for a character that has no token
        raise DataError(f"{name or repr(text[:40])}: the model's tokenizer can't encode it: {error}") from error
    special = set(tokenizer.all_special_ids)
    while ids and ids[-1] in special:
        ids.pop()
    return ids


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """What the tokenizer puts in front of a text, such as `<s>`; often nothing.

    Args:
        tokenizer: The model's.
        text: Some text that it can encode; what stands in front is the same of any.
    """
    ids, bare = (list(tokenizer(text, add_special_tokens=special)["input_ids"]) for special in (True, False))
    special = set(tokenizer.all_special_ids)
    found: list[int] = []
    for token in ids:
        if token not in special or token in bare:
            break
        found.append(token)
    return found


def _letter(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int | None:
    """A token that is one visible character and nothing else, a letter where there is one."""
    names = tokenizer.get_vocab()
    letters = [names[letter] for letter in ascii_letters if letter in names]
    usual = [token for token in letters if token in set(ids)]
    return next((token for token in [*usual, *ids] if _visible(decode(tokenizer, [token]))), None)


def _visible(text: str) -> bool:
    return len(text) == 1 and text.isascii() and text.isprintable() and text != " "


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
