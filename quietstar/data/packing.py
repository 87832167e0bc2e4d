"""Concatenate and cut: documents become equally long blocks of tokens, without padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.config import DataOptions
from quietstar.data.sources import Document, read_documents
from quietstar.errors import ConfigError, DataError

PIECE = 50_000
"""Characters that are tokenised at once: it bounds the memory, which is some hundred bytes per token."""

CONTEXT = 1_000
"""Characters of the neighbouring pieces that a piece is tokenised together with."""


@dataclass(frozen=True)
class PackedTexts:
    """Texts of equal length.

    Args:
        tokens: int64 [n, length], the blocks in the order of the documents.
    """

    tokens: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Tokens per text."""
        return self.tokens.shape[1]


def pack(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, length: int, append_eos: bool = True
) -> PackedTexts:
    """Tokenises documents, joins them with the end-of-sequence token, and cuts the result into blocks.

    Special tokens that the tokenizer would put around a text (such as BOS) are left out: a block begins anywhere.

    Args:
        documents: The texts, read one at a time.
        tokenizer: Any transformers tokenizer.
        length: Tokens per block. What is left over at the end is dropped.
        append_eos: Put the end-of-sequence token after each document.

    Raises:
        ConfigError: if append_eos is asked of a tokenizer that has no such token.
        DataError: if the text is shorter than one block.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    eos = tokenizer.eos_token_id
    if append_eos and not isinstance(eos, int):
        raise ConfigError("data.append_eos: this tokenizer has no end-of-sequence token; set data.append_eos to false")
    parts: list[np.ndarray[tuple[int], np.dtype[np.int32]]] = []
    sources: dict[str, None] = {}  # a dict keeps the order, for the message
    for document in documents:
        sources[document.source] = None
        try:
            parts += [np.asarray(ids, dtype=np.int32) for ids in token_ids(document.text, tokenizer)]
        except Exception as error:  # tokenizers raises plain Exception, e.g. for a character that has no token
            where = document.source if document.line is None else f"{document.source}:{document.line}"
            raise DataError(f"{where}: the tokenizer can't encode this text: {error}") from error
        if append_eos:
            parts.append(np.asarray([eos], dtype=np.int32))
    total = sum(part.size for part in parts)
    if total < length:
        named = ", ".join(list(sources)[:3]) + (" and more" if len(sources) > 3 else "")
        raise DataError(
            f"{named or 'no document'}: {total} tokens of text, needs at least {length} for one training text; "
            "give more text or a smaller data.length"
        )
    blocks = total // length
    joined = np.concatenate(parts)[: blocks * length].astype(np.int64)
    return PackedTexts(torch.from_numpy(joined).view(blocks, length))


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


def split(texts: PackedTexts, fraction: float) -> tuple[PackedTexts, PackedTexts | None]:
    """Holds out the last blocks, at least one, for evaluation; a fraction of 0 holds out nothing.

    Raises:
        DataError: if nothing would be left to train on.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be at least 0 and less than 1, got {fraction}")
    if fraction == 0:
        return texts, None
    held_out = max(1, round(fraction * len(texts)))
    if held_out >= len(texts):
        raise DataError(
            f"data.path: {len(texts)} text(s) of {texts.length} tokens, of which {held_out} would be held out; "
            "give more text or a data.validation_path, or set data.validation_fraction to 0"
        )
    train = PackedTexts(texts.tokens[:-held_out])
    return train, PackedTexts(texts.tokens[-held_out:])


def load_texts(options: DataOptions, tokenizer: PreTrainedTokenizerBase) -> tuple[PackedTexts, PackedTexts | None]:
    """Reads, packs and splits what the options name.

    Returns:
        The texts to train on and the held-out ones, if any.

    Raises:
        ConfigError: without a data.path, or with an option that the tokenizer cannot serve.
        DataError: for anything that is wrong with the files.
    """
    if options.path is None:
        raise ConfigError("data.path: missing; needs a text file, a .jsonl file, or a directory of both")
    train = pack(read_documents(options.path, options.field), tokenizer, options.length, options.append_eos)
    if options.validation_path is None:
        return split(train, options.validation_fraction)
    held_out = read_documents(options.validation_path, options.field)
    return train, pack(held_out, tokenizer, options.length, options.append_eos)
