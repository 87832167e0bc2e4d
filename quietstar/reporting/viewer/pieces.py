"""What single tokens look like."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from quietstar.reporting.samples import tokenizer_text

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
_REPLACED = "\N{REPLACEMENT CHARACTER}"
_VISIBLE_BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHER_BYTES = [byte for byte in range(256) if byte not in _VISIBLE_BYTES]
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE_BYTES} | {chr(256 + i): byte for i, byte in enumerate(_OTHER_BYTES)}
"""The alphabet of byte-level tokenizers: a character for each byte."""


def vocabulary(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> dict[int, str | list[int]]:
    """The text of each token by itself, spaces included; a list of bytes where that is no whole character.

    Args:
        tokenizer: Any of transformers'.
        ids: Also those that only the model has: its vocabulary may be larger.
    """
    return {token: _alone(tokenizer, token) for token in sorted(set(ids))}


def pieces(ids: Sequence[int], texts: dict[int, str | list[int]]) -> dict[int, str]:
    """By index the characters that end in a token after others began them.

    Args:
        ids: A text.
        texts: Its `vocabulary`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found = {}
    for index, token in enumerate(ids):
        text = texts[token]
        if isinstance(text, str):
            decoder.reset()
            continue
        added = decoder.decode(bytes(text))
        if _REPLACED in added:
            decoder.reset()
        elif added:
            found[index] = added
    return found


def _alone(tokenizer: PreTrainedTokenizerBase, token: int) -> str | list[int]:
    piece: Any = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
    if piece is None:
        return f"⟨{token}⟩"
    text = tokenizer_text(tokenizer, [token])
    if byte := _BYTE.fullmatch(piece):
        raw = bytes.fromhex(byte[1])
    elif _REPLACED in text and all(character in _BYTE_OF for character in piece):
        raw = bytes(_BYTE_OF[character] for character in piece)
    else:
        # alone, a tokenizer of words drops the space in front of the first one
        lost = piece.startswith(_WORD_START) and not text.startswith(" ")
        return (" " + text) if lost else text or piece
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return list(raw)
