"""Crop: of each document a random piece, another one in each epoch; shorter documents are padded on the right."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from quietstar.data.bad_rows import BadRows
from quietstar.data.batches import Batch
from quietstar.data.order import BatchOrder, draw
from quietstar.data.packing import Encoder, PackedTexts, encode_documents, held_out_of
from quietstar.data.sources import Document
from quietstar.errors import DataError

SHORTEST = 2
"""Tokens of a document below which there is nothing to predict."""

HELD_OUT_SEED = 0
"""Held-out documents are cropped in the same places whatever the seed of the run."""


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What the authors pad with: the end-of-sequence token, or 0 where there is none."""
    eos = tokenizer.eos_token_id
    return eos if isinstance(eos, int) else 0


def crop(
    tokens: NDArray[np.int32], length: int, padding: int, *key: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A piece of a document.

    Args:
        tokens: int32 [n], the document.
        length: Tokens of the piece.
        padding: Token that fills up a shorter document.
        key: Integers that decide where the piece begins; every place is as likely as another.

    Returns:
        int64 [length], the piece, and int64 [length], 1 for its tokens and 0 for padding.
    """
    start = draw(max(0, tokens.size - length) + 1, *key)
    piece = tokens[start : start + length]
    text = np.full(length, padding, dtype=np.int64)
    text[: piece.size] = piece
    return text, (np.arange(length) < piece.size).astype(np.int64)


class CroppedDocuments:
    """Documents in memory, of which each text is a piece.

    Args:
        documents: int32 [n] each, their tokens.
        places: `file` or `file:line` of each.
        length: Tokens per text.
        padding: Token that fills up shorter documents.
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
        """A piece of each of some documents, given by the epoch and their number."""
        pieces = [
            crop(self._documents[document], self._length, self._padding, seed, epoch, document)
            for epoch, document in places
        ]
        tokens, masks = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*pieces, strict=True))
        return PackedTexts(tokens, masks)

    def held_out(self) -> PackedTexts:
        """One piece of every document, the same in every run."""
        return self.texts(((0, document) for document in range(len(self))), HELD_OUT_SEED)

    def split(self, fraction: float) -> tuple[CroppedDocuments, CroppedDocuments | None]:
        """Holds out the last documents, at least one; a fraction of 0 holds out nothing.

        Raises:
            DataError: if nothing would be left to train on.
        """
        count = held_out_of(len(self), fraction, "document(s)")
        if not count:
            return self, None
        return self._part(slice(-count)), self._part(slice(-count, None))

    def _part(self, chosen: slice) -> CroppedDocuments:
        return CroppedDocuments(self._documents[chosen], self.places[chosen], self._length, self._padding)

    def fingerprint(self) -> dict[str, Any]:
        """Number of documents, length of the pieces, and hash of all tokens."""
        digest = hashlib.sha256()
        for document in self._documents:
            digest.update(document.size.to_bytes(8, "little"))
            digest.update(document.data)
        return {"shape": [len(self), self._length], "padding": self._padding, "sha256": digest.hexdigest()}


class CroppedBatches:
    """Cropped documents in the order of `BatchOrder`: the position is the step, and there is no other state.

    Args:
        documents: What to crop.
        batch_size: Documents per optimizer step.
        seed: Of the order and of the places of the pieces.
        skipped: Rows of the data that could not be used.
    """

    def __init__(self, documents: CroppedDocuments, batch_size: int, seed: int, skipped: int = 0) -> None:
        self._documents = documents
        self._seed = seed
        self._order = BatchOrder(len(documents), batch_size, seed)
        self._fingerprint: dict[str, Any] | None = None
        self.skipped = skipped

    def batch(self, step: int) -> Batch:
        """The texts of optimizer step `step`, counted from 1."""
        places = self._order.places(step - 1)
        texts = self._documents.texts(places, self._seed)
        names = [self._documents.places[document] for _, document in places]
        return Batch(texts.tokens, texts.attention_mask, names)

    def fingerprint(self) -> dict[str, Any]:
        """That of the documents."""
        if self._fingerprint is None:
            self._fingerprint = self._documents.fingerprint()
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the step says it all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take back."""

    def close(self) -> None:
        """Nothing to let go of."""


def read_cropped(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    append_eos: bool,
    bad_rows: BadRows,
) -> CroppedDocuments:
    """Tokenises documents.

    Args:
        documents: The texts, read one at a time.
        tokenizer: Any transformers tokenizer.
        length: Tokens per text.
        append_eos: Put the end-of-sequence token after each document.
        bad_rows: What to do with a document of fewer than two tokens, or one that cannot be encoded.

    Raises:
        ConfigError: if append_eos is asked of a tokenizer that has no such token.
        DataError: if there is no document that can be used.
    """
    arrays, places = [], []
    for document, tokens in encode_documents(documents, Encoder(tokenizer, append_eos), bad_rows, at_least=SHORTEST):
        arrays.append(tokens)
        places.append(document.place)
    if not arrays:
        raise DataError(f"data.path: no document that can be used ({bad_rows.count} rows could not be)")
    return CroppedDocuments(arrays, places, length, padding_token(tokenizer))
