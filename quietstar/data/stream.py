"""The rows of a dataset's shards in shuffled order, and the threads that work on them ahead of their consumer.

`ShuffledRows` gives the rows from a `Position` of three integers on, and holds no other state. `ReadAhead` applies a
function to items in threads and gives the results in the order of the items.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count, islice
from typing import Generic, TypeVar

from quietstar.data.batches import permutation
from quietstar.data.rows import Row
from quietstar.data.shards import Shard
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
