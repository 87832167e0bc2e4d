"""Texts of equal length cut from the rows of a stream, one after another, from a position of a few integers on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from quietstar.data.bad_rows import BadRow, BadRows
from quietstar.data.cropping import SHORTEST, crop, padding_token
from quietstar.data.packing import Encoder, check_size, numbers_in_text
from quietstar.data.read_ahead import ReadAhead
from quietstar.data.rows import Row, text_of
from quietstar.data.stream import Position, ShuffledRows
from quietstar.errors import DataError

AHEAD = 32
"""Documents that are tokenised ahead."""


class Text(NamedTuple):
    """One text.

    Args:
        tokens: int64 [length].
        attention_mask: As in `Batch`, int64 [length], or None.
        name: Where it comes from.
    """

    tokens: NDArray[np.int64]
    attention_mask: NDArray[np.int64] | None
    name: str


class _Encoded(NamedTuple):
    """A row with its tokens; without any it is blank, or cannot be used because of a problem."""

    position: Position
    place: str
    tokens: NDArray[np.int32] | None
    problem: str


@dataclass(frozen=True)
class _EncodeRow:
    """What a thread does with a row."""

    encoder: Encoder
    field: str
    at_least: int

    def __call__(self, numbered: tuple[Position, Row]) -> _Encoded:
        position, row = numbered
        try:
            text = text_of(row, self.field)
            if text is None:
                return _Encoded(position, row.place, None, "")
            tokens = self.encoder(text)
            check_size(tokens, self.at_least)
        except BadRow as error:
            return _Encoded(position, row.place, None, str(error))
        return _Encoded(position, row.place, tokens, "")


class TextStream:
    """The texts of a stream. It ends where an error is raised, and nowhere else.

    Args:
        rows: The rows in their order.
        tokenizer: Any transformers tokenizer; each thread gets a copy.
        field: Field or column that holds the text.
        length: Tokens per text.
        packing: As in `DataOptions`.
        append_eos: Put the end-of-sequence token after each document.
        seed: Of the places that are cropped.
        bad_rows: What to do with rows that cannot be used. Each counts once, in the first epoch.
        workers: Threads that read and tokenise ahead; 0: none.

    Attributes:
        position: The row that the next text begins in.
        token: Tokens of this row that earlier texts have taken.

    Raises:
        ConfigError: append_eos is asked of a tokenizer that has no end-of-sequence token.
    """

    def __init__(
        self,
        rows: ShuffledRows,
        tokenizer: PreTrainedTokenizerBase,
        *,
        field: str,
        length: int,
        packing: Literal["joined", "separate", "crop"],
        append_eos: bool,
        seed: int,
        bad_rows: BadRows,
        workers: int = 0,
    ) -> None:
        self._rows = rows
        self._length = length
        self._packing = packing
        self._padding = padding_token(tokenizer)
        self._seed = seed
        self._bad_rows = bad_rows
        at_least = SHORTEST if packing == "crop" else 0
        # copies: a tokenizer is not safe to share between threads, nor with whoever else uses this one
        tokenizers = [copy.deepcopy(tokenizer) for _ in range(workers)] or [tokenizer]
        self._functions = [_EncodeRow(Encoder(each, append_eos), field, at_least) for each in tokenizers]
        self._ahead = workers > 0
        self._encoded: Iterator[_Encoded] | None = None
        self._current: _Encoded | None = None
        self.position = Position()
        self.token = 0

    def seek(self, position: Position, token: int = 0) -> None:
        """Goes on from there."""
        self.close()
        self.position, self.token = position, token

    def close(self) -> None:
        """Ends the threads; the next text starts them again."""
        if isinstance(self._encoded, ReadAhead):
            self._encoded.close()
        self._encoded = self._current = None

    def next(self) -> Text:
        """The text at the position, which moves behind it.

        Raises:
            DataError: A shard cannot be read, a row cannot be used, or an epoch does not have the tokens of one text.
        """
        return self._crop() if self._packing == "crop" else self._cut()

    def _cut(self) -> Text:
        began = self.position.epoch
        name = ""
        pieces: list[NDArray[np.int32]] = []
        missing = self._length
        while missing:
            document = self._document(began)
            assert document.tokens is not None
            piece = document.tokens[self.token : self.token + missing]
            if piece.size:
                name = name or document.place + (f" from token {self.token + 1}" if self.token else "")
                pieces.append(piece)
                missing -= piece.size
            self.token += piece.size
            if self.token >= document.tokens.size:
                self._leave(document)
        mask = None
        if self._packing == "separate":
            numbers = np.repeat(np.arange(len(pieces)), [piece.size for piece in pieces])
            mask = numbers_in_text(numbers)
        return Text(np.concatenate(pieces).astype(np.int64), mask, name)

    def _crop(self) -> Text:
        document = self._document(self.position.epoch)
        assert document.tokens is not None
        position = document.position
        key = (self._seed, position.epoch, position.shard, position.row)
        tokens, mask = crop(document.tokens, self._length, self._padding, *key)
        self._leave(document)
        return Text(tokens, mask, document.place)

    def _document(self, began: int) -> _Encoded:
        """The row at the position, or the next one that can be used; `began` is the epoch in which the text begins."""
        while self._current is None:
            encoded = next(self._open())
            if encoded.position.epoch > began + 1:
                raise DataError(
                    f"{self._rows.shards[0].path}: {len(self._rows.shards)} shard(s) with less text in all than one "
                    f"training text of {self._length} tokens needs ({self._bad_rows.count} rows could not be used); "
                    "give more text or a smaller data.length"
                )
            if encoded.position != self.position:
                self.position, self.token = encoded.position, 0
            if encoded.tokens is None:
                if encoded.problem and encoded.position.epoch == 0:
                    self._bad_rows.report(encoded.place, encoded.problem)
                self._leave(encoded)
            else:
                self._current = encoded
        return self._current

    def _leave(self, row: _Encoded) -> None:
        self._current = None
        self.position, self.token = row.position.next(), 0

    def _open(self) -> Iterator[_Encoded]:
        if self._encoded is None:
            rows = self._rows.read(self.position)
            self._encoded = ReadAhead(rows, self._functions, AHEAD) if self._ahead else map(self._functions[0], rows)
        return self._encoded
