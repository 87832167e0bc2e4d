"""Documents in memory become texts of equal length, in one of two ways.

`pack` concatenates the documents and cuts them into blocks, without padding. `CroppedDocuments` takes a random piece of
each document, another one in each epoch; shorter documents are padded on the right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.data.batches import Batch, BatchOrder, draw
from quietstar.data.rows import TRAINING, BadRow, BadRows, OptionNames
from quietstar.data.sources import Document
from quietstar.data.tokenizer import ChatText, SpecialTokens
from quietstar.errors import ConfigError, DataError

SHORTEST = 2
"""Fewest tokens of a document: with fewer there is nothing to predict."""

HELD_OUT_SEED = 0
"""Seed of the places where held-out documents are cropped: the same in every run, whatever the run's seed."""


@dataclass(frozen=True)
class PackedTexts:
    """Texts of equal length.

    Args:
        tokens: Token ids of the texts in the order of the documents, int64 [n, length].
        attention_mask: Number of each token's document within its text, 1, 2, ..., and 0 at padding; int64 [n, length].
            None where there is neither padding nor a border between documents.
    """

    tokens: Tensor
    attention_mask: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Number of tokens in each text."""
        return self.tokens.shape[1]

    def part(self, texts: slice) -> PackedTexts:
        """Returns some of the texts."""
        return PackedTexts(self.tokens[texts], None if self.attention_mask is None else self.attention_mask[texts])


class Encoder:
    """Encodes documents, with the end-of-sequence token after each.

    Special tokens that the tokenizer would put around a text (such as BOS) are left out: a block begins anywhere.

    Args:
        tokenizer: Tokenizer of the base model; any transformers tokenizer.
        append_eos: Whether to put the end-of-sequence token after each document; a chat that ends in it gets no other.
        special: Whether the text of a special token, such as `<|endoftext|>`, is this token rather than characters.
        names: Names of the options that messages advise to change.

    Attributes:
        special: Rule for the texts of special tokens.

    Raises:
        ConfigError: `append_eos` is set, and the tokenizer has no end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        append_eos: bool = True,
        special: bool = True,
        names: OptionNames = TRAINING,
    ) -> None:
        eos = tokenizer.eos_token_id
        if append_eos and not isinstance(eos, int):
            raise ConfigError(
                "data.append_eos: this tokenizer has no end-of-sequence token; set data.append_eos to false"
            )
        self.special = SpecialTokens(tokenizer, special, names.special_tokens)
        self._end = [eos] if append_eos else []

    def special_in(self, text: str) -> int:
        """Returns how often a document has the text of a special token; of a chat, how often its messages have."""
        return self.special.count(text)

    def __call__(self, text: str) -> NDArray[np.int32]:
        """Returns the token ids of a document, int32 [n].

        Raises:
            BadRow: The tokenizer cannot encode the text.
            ConfigError: The tokenizer cannot read the text of a special token as characters.
        """
        pieces = [np.asarray(ids, dtype=np.int32) for ids in self.special.ids(text)]
        tokens: NDArray[np.int32] = np.concatenate([*pieces, np.zeros(0, dtype=np.int32)])
        if isinstance(text, ChatText) and tokens.size and tokens[-1:].tolist() == self._end:
            return tokens
        with_end: NDArray[np.int32] = np.concatenate([tokens, np.asarray(self._end, dtype=np.int32)])
        return with_end


def encode_documents(
    documents: Iterable[Document], encoder: Encoder, bad_rows: BadRows, at_least: int
) -> Iterator[tuple[Document, NDArray[np.int32]]]:
    """Yields documents with their token ids, int32 [n]; a document with fewer tokens than `at_least` is a bad row."""
    for document in documents:
        try:
            tokens = encoder(document.text)
            check_size(tokens, at_least)
        except BadRow as error:
            bad_rows.report(document.place, str(error))
        else:
            bad_rows.found_special(document.place, encoder.special_in(document.text), encoder.special.means)
            yield document, tokens


def check_size(tokens: NDArray[np.int32], at_least: int) -> None:
    """Raises `BadRow` for fewer tokens than `at_least`."""
    if tokens.size < at_least:
        raise BadRow(f"{tokens.size} token(s), needs at least {at_least}")


def pack(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    append_eos: bool = True,
    *,
    separate: bool = False,
    bad_rows: BadRows | None = None,
    special: bool = True,
    names: OptionNames = TRAINING,
) -> PackedTexts:
    """Tokenises documents, concatenates them, and cuts the result into blocks.

    Args:
        documents: Documents to pack, read one at a time.
        tokenizer: Tokenizer of the base model; any transformers tokenizer.
        length: Number of tokens in each block. What is left over at the end is dropped.
        append_eos: Whether to put the end-of-sequence token after each document.
        separate: Whether to number the documents of each block in an attention mask.
        bad_rows: Policy for a document that cannot be encoded; None stops at the first.
        special: Whether the text of a special token, such as `<|endoftext|>`, is this token rather than characters.
        names: Names of the options that messages advise to change.

    Raises:
        ConfigError: `append_eos` is set, and the tokenizer has no end-of-sequence token.
        DataError: The text is shorter than one block.
        ValueError: `length` is below 1.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    encoder = Encoder(tokenizer, append_eos, special, names)
    parts: list[NDArray[np.int32]] = []
    sources: dict[str, None] = {}  # a dict keeps the order, for the message
    for document, tokens in encode_documents(documents, encoder, bad_rows or BadRows(), at_least=0):
        sources[document.source] = None
        if tokens.size:
            parts.append(tokens)
    total = sum(part.size for part in parts)
    if total < length:
        raise DataError(
            f"{_named(sources)}: {total} tokens of text, needs at least {length} for one training text; "
            f"give more text or a smaller {names.length}"
        )
    blocks = total // length
    joined = np.concatenate(parts)[: blocks * length].astype(np.int64)
    mask = None
    if separate:
        numbers = np.repeat(np.arange(len(parts)), [part.size for part in parts])[: blocks * length]
        mask = torch.from_numpy(numbers_in_text(numbers.reshape(blocks, length)))
    return PackedTexts(torch.from_numpy(joined).view(blocks, length), mask)


def numbers_in_text(documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """Renumbers consecutive numbers of documents, [..., length], so that the first document of each text is 1."""
    return documents - documents[..., :1] + 1


def _named(sources: dict[str, None]) -> str:
    return ", ".join(list(sources)[:3]) + (" and more" if len(sources) > 3 else "") or "no document"


def split(texts: PackedTexts, fraction: float) -> tuple[PackedTexts, PackedTexts | None]:
    """Holds out the last blocks, at least one, for evaluation; a fraction of 0 holds out nothing.

    Raises:
        DataError: Nothing would be left to train on.
        ValueError: `fraction` is not in [0, 1).
    """
    held_out = held_out_of(len(texts), fraction, f"text(s) of {texts.length} tokens")
    if not held_out:
        return texts, None
    return texts.part(slice(-held_out)), texts.part(slice(-held_out, None))


def held_out_of(count: int, fraction: float, what: str) -> int:
    """Returns how many of `count` texts or documents are held out: at least one, but 0 for a fraction of 0.

    Raises:
        DataError: Nothing would be left to train on; the message calls the texts or documents `what`.
        ValueError: `fraction` is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be at least 0 and less than 1, got {fraction}")
    if fraction == 0:
        return 0
    held_out = max(1, round(fraction * count))
    if held_out >= count:
        raise DataError(
            f"data.path: {count} {what}, of which {held_out} would be held out; "
            "give more text or a data.validation_path, or set data.validation_fraction to 0"
        )
    return held_out


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token that the authors pad with: end-of-sequence, or 0 where the tokenizer has none."""
    eos = tokenizer.eos_token_id
    return eos if isinstance(eos, int) else 0


def crop(
    tokens: NDArray[np.int32], length: int, padding: int, *key: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cuts a random piece out of a document.

    Args:
        tokens: Token ids of the document, int32 [n].
        length: Number of tokens in the piece.
        padding: Id of the token that fills up a shorter document.
        key: Integers that decide where the piece begins; all places are equally likely.

    Returns:
        The piece, int64 [length], and an attention mask, int64 [length]: 1 at tokens and 0 at padding.
    """
    start = draw(max(0, tokens.size - length) + 1, *key)
    piece = tokens[start : start + length]
    text = np.full(length, padding, dtype=np.int64)
    text[: piece.size] = piece
    return text, (np.arange(length) < piece.size).astype(np.int64)


class CroppedDocuments:
    """Documents in memory; each text is a piece of one of them.

    Args:
        documents: Token ids of each document, int32 [n].
        places: Place of each document, as `file` or `file:line`.
        length: Number of tokens in each text.
        padding: Id of the token that fills up shorter documents.
    """

    def __init__(
        self, documents: Sequence[NDArray[np.int32]], places: Sequence[str], length: int, padding: int
    ) -> None:
        self.places = places
        self._documents = documents
        self._length = length
        self._padding = padding

    def __len__(self) -> int:
        return len(self._documents)

    def texts(self, places: Iterable[tuple[int, int]], seed: int) -> PackedTexts:
        """Returns a piece of each document in `places`, which gives its epoch and its number, both from 0."""
        pieces = [
            crop(self._documents[document], self._length, self._padding, seed, epoch, document)
            for epoch, document in places
        ]
        tokens, masks = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*pieces, strict=True))
        return PackedTexts(tokens, masks)

    def held_out(self) -> PackedTexts:
        """Returns one piece of every document, the same in every run."""
        return self.texts(((0, document) for document in range(len(self))), HELD_OUT_SEED)

    def split(self, fraction: float) -> tuple[CroppedDocuments, CroppedDocuments | None]:
        """Holds out the last documents, at least one; a fraction of 0 holds out nothing.

        Raises:
            DataError: Nothing would be left to train on.
            ValueError: `fraction` is not in [0, 1).
        """
        count = held_out_of(len(self), fraction, "document(s)")
        if not count:
            return self, None
        return self._part(slice(-count)), self._part(slice(-count, None))

    def _part(self, chosen: slice) -> CroppedDocuments:
        return CroppedDocuments(self._documents[chosen], self.places[chosen], self._length, self._padding)

    def fingerprint(self) -> dict[str, Any]:
        """Returns the number of documents, the length of the pieces, the padding token and a hash of all tokens."""
        digest = hashlib.sha256()
        for document in self._documents:
            digest.update(document.size.to_bytes(8, "little"))
            digest.update(document.data)
        return {"shape": [len(self), self._length], "padding": self._padding, "sha256": digest.hexdigest()}


class CroppedBatches:
    """Cropped documents in the order of `BatchOrder`; the step is the only state.

    Args:
        documents: Documents to take pieces of.
        batch_size: Number of documents per optimizer step.
        seed: Seed of the order and of the places of the pieces.
        skipped: Number of rows of the data that could not be used.
        special: Number of times that the data has the text of a special token.
    """

    def __init__(
        self, documents: CroppedDocuments, batch_size: int, seed: int, skipped: int = 0, special: int = 0
    ) -> None:
        self._documents = documents
        self._seed = seed
        self._order = BatchOrder(len(documents), batch_size, seed)
        self._fingerprint: dict[str, Any] | None = None
        self.skipped = skipped
        self.special = special

    def batch(self, step: int) -> Batch:
        """Returns the texts of optimizer step `step`, counted from 1."""
        places = self._order.places(step - 1)
        texts = self._documents.texts(places, self._seed)
        names = [self._documents.places[document] for _, document in places]
        return Batch(texts.tokens, texts.attention_mask, names)

    def fingerprint(self) -> dict[str, Any]:
        """Returns the fingerprint of the documents."""
        if self._fingerprint is None:
            self._fingerprint = self._documents.fingerprint()
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state: the step determines the batch."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Does nothing: there is no state."""

    def close(self) -> None:
        """Does nothing: there are no files or threads to release."""


def read_cropped(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    append_eos: bool,
    bad_rows: BadRows,
    special: bool = True,
) -> CroppedDocuments:
    """Tokenises documents and keeps them in memory, to be cropped later.

    Args:
        documents: Documents to read, one at a time.
        tokenizer: Tokenizer of the base model; any transformers tokenizer.
        length: Number of tokens in each text.
        append_eos: Whether to put the end-of-sequence token after each document.
        bad_rows: Policy for documents that have fewer than two tokens or cannot be encoded.
        special: Whether the text of a special token, such as `<|endoftext|>`, is this token rather than characters.

    Raises:
        ConfigError: `append_eos` is set, and the tokenizer has no end-of-sequence token.
        DataError: No document can be used.
    """
    arrays, places = [], []
    encoder = Encoder(tokenizer, append_eos, special)
    for document, tokens in encode_documents(documents, encoder, bad_rows, at_least=SHORTEST):
        arrays.append(tokens)
        places.append(document.place)
    if not arrays:
        raise DataError(f"data.path: no document that can be used ({bad_rows.count} rows could not be)")
    return CroppedDocuments(arrays, places, length, padding_token(tokenizer))
