"""A stream of training texts, for training text that does not fit in memory.

`ShuffledRows` gives the rows of shards from a `Position` of three integers on, and holds no other state. `ReadAhead`
applies a function to items in threads and gives the results in the order of the items. `TextStream` cuts texts of equal
length from the rows, one after another; `StreamedBatches` makes batches of them.
"""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from quietstar.data.batches import Batch, permutation
from quietstar.data.packing import SHORTEST, Encoder, PackedTexts, check_size, crop, numbers_in_text, padding_token
from quietstar.data.rows import BadRow, BadRows, Row, text_of
from quietstar.data.shards import Shard
from quietstar.data.sources import place_of
from quietstar.data.tokenizer import ChatTemplate
from quietstar.errors import DataError

WHOLE_SHARD = sys.maxsize


@dataclass(frozen=True, order=True)
class Position:
    """A place in the order of an epoch.

    Args:
        epoch: Number of the epoch, from 0.
        shard: Place among the shards in the order of this epoch, from 0.
        row: Place among the rows of the shard in the order of this epoch, from 0.
    """

    epoch: int = 0
    shard: int = 0
    row: int = 0

    def next(self) -> Position:
        """Returns the place after this one; after the last row of a shard the reader goes on to the next shard."""
        return Position(self.epoch, self.shard, self.row + 1)


class ShuffledRows:
    """The rows of shards, epoch after epoch without end.

    Shards are shuffled among themselves and rows within windows, by a hash of (seed, epoch, shard, window). The order
    is a function of the position, and only one window is in memory.

    Args:
        shards: Files to read, in the same order in every run.
        field: Field or column that holds the text.
        max_row_bytes: Most bytes of a row; longer rows come without content.
        seed: Seed of the order of shards and rows.
        window: Number of rows that are shuffled together; 1 keeps shards and rows in order.
        held_out: Number of rows at the beginning of each shard that are left out; None leaves out none.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        field: str,
        max_row_bytes: int,
        *,
        seed: int = 0,
        window: int = 1,
        held_out: Sequence[int] | None = None,
    ) -> None:
        self.shards = shards
        self._field = field
        self._max_row_bytes = max_row_bytes
        self._seed = seed
        self._window = window
        self._held_out = held_out or [0] * len(shards)

    def read(self, start: Position) -> Iterator[tuple[Position, Row]]:
        """Yields the rows from a position on, each with its position.

        Raises:
            DataError: A shard cannot be read, or an epoch has no rows.
        """
        for epoch in count(start.epoch):
            order = permutation(len(self.shards), self._seed, epoch) if self._window > 1 else range(len(self.shards))
            empty = epoch > start.epoch
            for place in range(start.shard if epoch == start.epoch else 0, len(self.shards)):
                first = start.row if (epoch, place) == (start.epoch, start.shard) else 0
                for row, content in self._read_shard(epoch, int(order[place]), first):
                    empty = False
                    yield Position(epoch, place, row), content
            if empty:
                raise DataError(f"{self.shards[0].path}: {len(self.shards)} shard(s) without any row to train on")

    def _read_shard(self, epoch: int, number: int, start: int) -> Iterator[tuple[int, Row]]:
        held_out = self._held_out[number]
        if held_out == WHOLE_SHARD:
            return
        first, skipped = divmod(start, self._window)
        rows = self.shards[number].rows(first * self._window, self._field, self._max_row_bytes)
        for window in count(first):
            rows_in_it = list(islice(rows, self._window))
            if not rows_in_it:
                return
            order = permutation(len(rows_in_it), self._seed, epoch, number, window) if self._window > 1 else [0]
            for place in range(skipped if window == first else 0, len(rows_in_it)):
                row = rows_in_it[order[place]]
                if row.index >= held_out:
                    yield window * self._window + place, row


ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class _Shared(Generic[ItemT, ResultT]):
    """What the threads and the consumer share. The threads hold no reference to the consumer, so it can be collected.

    Args:
        items: Items to work on, read by one thread at a time.
        ahead: Largest number of results that wait for the consumer.
    """

    def __init__(self, items: Iterator[ItemT], ahead: int) -> None:
        self.items = items
        self.ahead = ahead
        self.reading = threading.Lock()
        self.results: deque[Future[ResultT]] = deque()
        self.changed = threading.Condition()
        self.ended = False


class ReadAhead(Iterator[ResultT], Generic[ItemT, ResultT]):
    """Applies functions to items in threads, and gives the results in the order of the items.

    An exception of `items` or of a function is raised in the place of the result, at each further call too.

    Args:
        items: Items to work on.
        functions: Function of each thread, one per thread, so that none needs to be thread-safe.
        ahead: Largest number of results that wait for the consumer.
    """

    def __init__(self, items: Iterator[ItemT], functions: Sequence[Callable[[ItemT], ResultT]], ahead: int) -> None:
        self._shared = _Shared[ItemT, ResultT](items, ahead)
        threads = [
            threading.Thread(target=_work, args=(self._shared, function), name=f"read-ahead-{number}", daemon=True)
            for number, function in enumerate(functions)
        ]
        # also runs when the interpreter ends, which must not find a thread inside a library
        self._close = weakref.finalize(self, _stop, self._shared, threads)
        for thread in threads:
            thread.start()

    def __next__(self) -> ResultT:
        shared = self._shared
        with shared.changed:
            while not shared.results:
                if not self._close.alive:
                    raise StopIteration
                shared.changed.wait()
            first = shared.results[0]
        result = first.result()  # before it is taken off: an interrupt while waiting loses nothing
        with shared.changed:
            shared.results.popleft()
            shared.changed.notify_all()
        return result

    def close(self) -> None:
        """Ends the threads and drops what they have read."""
        self._close()


def _work(shared: _Shared[ItemT, ResultT], function: Callable[[ItemT], ResultT]) -> None:
    while True:
        result: Future[ResultT] = Future()
        with shared.reading:  # the results are queued in the order of the items
            with shared.changed:
                while not shared.ended and len(shared.results) >= shared.ahead:
                    shared.changed.wait()
                if shared.ended:
                    return
            try:
                item = next(shared.items)
            except BaseException as error:  # StopIteration too: the consumer raises what it finds
                shared.ended = True
                _stand_in_line(shared, result)
                result.set_exception(error)
                return
            _stand_in_line(shared, result)
        try:
            result.set_result(function(item))
        except BaseException as error:
            result.set_exception(error)
        del item


def _stand_in_line(shared: _Shared[ItemT, ResultT], result: Future[ResultT]) -> None:
    with shared.changed:
        shared.results.append(result)
        shared.changed.notify_all()


def _stop(shared: _Shared[ItemT, ResultT], threads: list[threading.Thread]) -> None:
    with shared.changed:
        shared.ended = True
        shared.changed.notify_all()
    for thread in threads:
        if thread is not threading.current_thread():  # a garbage collection may run in any of them
            thread.join(timeout=5)  # a thread that waits for the network ends by itself later


AHEAD = 32
"""Number of documents that are tokenised ahead."""


class Text(NamedTuple):
    """One training text.

    Args:
        tokens: Token ids, int64 [length].
        attention_mask: Number of each token's document, 0 at padding, int64 [length]; None: one document, unpadded.
        name: Place that the text comes from, for messages.
    """

    tokens: NDArray[np.int64]
    attention_mask: NDArray[np.int64] | None
    name: str


class _Encoded(NamedTuple):
    """A row with its tokens; they are None where the row is blank, or cannot be used because of a problem."""

    position: Position
    place: str
    tokens: NDArray[np.int32] | None
    problem: str
    special: int = 0


@dataclass(frozen=True)
class _EncodeRow:
    """Turns a row into tokens, in a thread."""

    encoder: Encoder
    field: str
    render: ChatTemplate
    at_least: int

    def __call__(self, numbered: tuple[Position, Row]) -> _Encoded:
        position, row = numbered
        try:
            text = text_of(row, self.field, self.render)
            if text is None:
                return _Encoded(position, row.place, None, "")
            tokens = self.encoder(text)
            check_size(tokens, self.at_least)
        except BadRow as error:
            return _Encoded(position, place_of(row, error), None, str(error))
        return _Encoded(position, row.place, tokens, "", self.encoder.special_in(text))


class TextStream:
    """The texts of a stream, epoch after epoch. The stream ends only where an error is raised.

    Args:
        rows: Rows of the dataset in their order.
        tokenizer: Tokenizer of the base model; each thread gets a copy.
        field: Field or column that holds the text.
        length: Number of tokens in each text.
        packing: Way in which documents become texts, as in `DataOptions`: `joined`, `separate` or `crop`.
        append_eos: Whether to put the end-of-sequence token after each document.
        seed: Seed of the places that are cropped.
        bad_rows: Policy for rows that cannot be used. Each row counts once, in the first epoch.
        workers: Number of threads that read and tokenise ahead; 0 starts none.
        special: Whether the text of a special token, such as `<|endoftext|>`, is this token rather than characters.

    Attributes:
        position: Position of the row that the next text begins in.
        token: Number of tokens of this row that earlier texts have taken.

    Raises:
        ConfigError: `append_eos` is set, and the tokenizer has no end-of-sequence token.
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
        special: bool = True,
    ) -> None:
        self._rows = rows
        self._length = length
        self._packing = packing
        self._padding = padding_token(tokenizer)
        self._seed = seed
        self._bad_rows = bad_rows
        at_least = SHORTEST if packing == "crop" else 0
        # copies: a tokenizer must not be shared between threads, nor with the caller
        tokenizers = [copy.deepcopy(tokenizer) for _ in range(workers)] or [tokenizer]
        self._functions = [
            _EncodeRow(Encoder(each, append_eos, special), field, ChatTemplate(each, special), at_least)
            for each in tokenizers
        ]
        self._ahead = workers > 0
        self._encoded: Iterator[_Encoded] | None = None
        self._current: _Encoded | None = None
        self.position = Position()
        self.token = 0

    def seek(self, position: Position, token: int = 0) -> None:
        """Continues from a position, after the first `token` tokens of its row."""
        self.close()
        self.position, self.token = position, token

    def close(self) -> None:
        """Ends the threads; the next text starts them again."""
        if isinstance(self._encoded, ReadAhead):
            self._encoded.close()
        self._encoded = self._current = None

    def next(self) -> Text:
        """Returns the text at the position, and moves the position to the end of the text.

        Raises:
            DataError: A shard cannot be read, a row cannot be used, or an epoch has fewer tokens than one text.
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
        """Returns the row at the position, or the next usable one; `began` is the epoch in which the text begins."""
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
        if row.special and row.position.epoch == 0:
            self._bad_rows.found_special(row.place, row.special, self._functions[0].encoder.special.means)
        self._current = None
        self.position, self.token = row.position.next(), 0

    def _open(self) -> Iterator[_Encoded]:
        if self._encoded is None:
            rows = self._rows.read(self.position)
            self._encoded = ReadAhead(rows, self._functions, AHEAD) if self._ahead else map(self._functions[0], rows)
        return self._encoded


class StreamedBatches:
    """The texts of a stream in its order. The state is a few integers: where the texts given out end, not the reading.

    Args:
        texts: Stream that gives the texts.
        batch_size: Number of texts per optimizer step.
        bad_rows: Count of bad rows that the stream uses.
        fingerprint: Plain JSON values that differ where the texts, or their order, differ.
    """

    def __init__(self, texts: TextStream, batch_size: int, bad_rows: BadRows, fingerprint: Mapping[str, Any]) -> None:
        self._texts = texts
        self._batch_size = batch_size
        self._bad_rows = bad_rows
        self._fingerprint = dict(fingerprint)
        self._start = self.state_dict()

    @property
    def skipped(self) -> int:
        """Number of rows that could not be used, those of earlier parts of a resumed run included."""
        return self._bad_rows.count

    @property
    def special(self) -> int:
        """Number of times that rows had the text of a special token, in earlier parts of a resumed run too."""
        return self._bad_rows.special

    def batch(self, step: int) -> Batch:
        """Returns the next texts; `step`, counted from 1, has to be the one after the last one asked for."""
        texts = [self._texts.next() for _ in range(self._batch_size)]
        packed = stack(texts)
        return Batch(packed.tokens, packed.attention_mask, [text.name for text in texts])

    def fingerprint(self) -> dict[str, Any]:
        """Returns the fingerprint of the stream."""
        return dict(self._fingerprint)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the next text (epoch, shard, row, token) and the counts of rows so far."""
        position = self._texts.position
        return {
            "epoch": position.epoch,
            "shard": position.shard,
            "row": position.row,
            "token": self._texts.token,
            "skipped": self._bad_rows.count,
            "special": self._bad_rows.special,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken; an empty state is the beginning.

        Raises:
            DataError: `state` is not the state of a stream.
        """
        state = state or self._start
        names = ("epoch", "shard", "row", "token", "skipped")
        numbers = [state[name] for name in names if isinstance(state.get(name), int) and state[name] >= 0]
        if len(numbers) < len(names):
            raise DataError(f"position of the data: got {dict(state)}, needs integers {', '.join(names)}")
        epoch, shard, row, token, skipped = numbers
        self._texts.seek(Position(epoch, shard, row), token)
        self._bad_rows.count = skipped
        special = state.get("special", 0)  # older states have no such count
        self._bad_rows.special = special if isinstance(special, int) else 0

    def close(self) -> None:
        """Ends the threads; the next batch starts them again."""
        self._texts.close()


def stack(texts: list[Text]) -> PackedTexts:
    """Stacks texts as tensors [n, length]."""
    masks = [text.attention_mask for text in texts if text.attention_mask is not None]
    return PackedTexts(
        torch.from_numpy(np.stack([text.tokens for text in texts])),
        torch.from_numpy(np.stack(masks)) if masks else None,
    )
