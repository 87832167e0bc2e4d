"""A function applied to a sequence in threads, ahead of whoever uses the results, in order."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class _Shared(Generic[ItemT, ResultT]):
    """What the threads and the consumer share. The threads hold no reference to the consumer, so it can be collected.

    Args:
        items: Read by one thread at a time.
        ahead: So many results are waiting at most.
    """

    def __init__(self, items: Iterator[ItemT], ahead: int) -> None:
        self.items = items
        self.ahead = ahead
        self.reading = threading.Lock()
        self.results: deque[Future[ResultT]] = deque()
        self.changed = threading.Condition()
        self.ended = False


class ReadAhead(Iterator[ResultT], Generic[ItemT, ResultT]):
    """Results in the order of the items. An exception of `items` or a function is raised in its place, again and again.

    Args:
        items: What to work on.
        functions: One for each thread, so that none needs to be safe to share.
        ahead: So many results are waiting at most.
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
        """Ends the threads; what they have read is dropped."""
        self._close()


def _work(shared: _Shared[ItemT, ResultT], function: Callable[[ItemT], ResultT]) -> None:
    while True:
        result: Future[ResultT] = Future()
        with shared.reading:  # the results stand in line in the order of the items
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
            thread.join(timeout=5)  # one that waits for a network ends by itself later
