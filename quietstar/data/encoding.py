"""Texts as token ids, in plain lists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from quietstar.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE = 50_000
"""Characters that are tokenised at once: it bounds the memory, which is some hundred bytes per token."""

CONTEXT = 1_000
"""Characters of the neighbouring pieces that a piece is tokenised together with."""


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Tokenises a long text piece by piece, with the ids that the whole text would have.

    A piece ends at a line break where it can, and is tokenised together with the ends of its neighbours: what a
    tokenizer does at the ends of a text (a space put in front, white space that waits for the next word) then happens
    in the neighbours' characters, whose tokens are left out by their offsets. Tokenizers without offsets (those written
    in Python) get the whole text at once.
    """
    if not tokenizer.is_fast:
        yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return
    start = 0
    while start < len(text):
        limit = start + PIECE
        end = len(text)
        if limit < end:
            end = text.rfind("\n", start + PIECE // 2, limit) + 1 or limit
        origin = max(0, start - CONTEXT)
        encoded = tokenizer(
            text[origin : end + CONTEXT], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        first, beyond = (start - origin if start else -1), (end - origin if end < len(text) else len(text) + 1)
        yield [
            token
            for token, (place, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            if first <= place < beyond
        ]
        start = end


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a text that a model is to continue, with what the tokenizer puts before a text (such as BOS).

    Raises:
        DataError: The tokenizer cannot encode it: it has no token for a character.
    """
    try:
        ids = list(tokenizer(prompt)["input_ids"])
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"the tokenizer cannot encode {prompt[:80]!r}: {error}") from None
    if ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        ids.pop()
    return ids
