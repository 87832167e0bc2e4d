"""The text of each token, for any tokenizer: decoding and encoding without loss, and the kind of each token of a
text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from string import ascii_letters

from transformers import PreTrainedTokenizerBase

from quietstar.errors import DataError

Texts = dict[int, str]
"""Text by token id; special tokens have the empty text."""

CLASSES = {
    "digit": "digits alone, with or without a space before them",
    "word": "begins a word: a letter, where the text before does not end in one",
    "continuation": "goes on with a word: a letter after a letter",
    "punctuation": "marks and symbols alone, with or without a space",
    "line end": "white space with a line end in it",
    "space": "other white space",
    "other": "parts of characters, special tokens, and mixtures that begin with none of the above",
}


def token_texts(tokenizer: PreTrainedTokenizerBase) -> Texts:
    """Returns the text that each token adds to the text before it, including its leading space.

    A tokenizer that decodes a single token may drop its space, so each is decoded after another token, usually a
    letter. Tokens that are a part of a character have the text of the replacement character.
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
    """Returns the text of token ids unchanged: nothing is cleaned up or left out."""
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def encode(tokenizer: PreTrainedTokenizerBase, text: str, name: str | None = None) -> list[int]:
    """Returns the token ids of a text, with the special tokens that the tokenizer puts before it and none after it.

    Args:
        tokenizer: Tokenizer of the model.
        text: Text of any content and length.
        name: Name of the text, or its place, for messages; by default its beginning.

    Raises:
        DataError: The tokenizer cannot encode the text.
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
    """Returns the tokens that the tokenizer puts before a text, such as `<s>`; often none.

    Args:
        tokenizer: Tokenizer of the model.
        text: Some text that the tokenizer can encode; its first tokens are those of any text.
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
    """Returns a token that is one visible character and nothing else, a letter where there is one."""
    names = tokenizer.get_vocab()
    letters = [names[letter] for letter in ascii_letters if letter in names]
    usual = [token for token in letters if token in set(ids)]
    return next((token for token in [*usual, *ids] if _visible(decode(tokenizer, [token]))), None)


def _visible(text: str) -> bool:
    return len(text) == 1 and text.isascii() and text.isprintable() and text != " "


def token_class(text: str, before: str) -> str:
    """Returns the class of a token, one of `CLASSES`.

    Args:
        text: Text of the token, including its leading space.
        before: Text of the token before it.
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
    """Returns the class of each token except the first.

    Args:
        ids: Token ids of a text.
        texts: Texts of all tokens of its tokenizer.
    """
    spelt = [texts.get(token, "") for token in ids]
    return [token_class(text, before) for before, text in pairwise(spelt)]
