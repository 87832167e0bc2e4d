"""Reading ahead: the same results in the same order, however many threads, and errors in their places."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quietstar.data.stream import ReadAhead


@given(items=st.lists(st.integers(0, 5), max_size=30), workers=st.integers(1, 4), ahead=st.integers(1, 5))
def test_results_come_in_the_order_of_the_items(items: list[int], workers: int, ahead: int) -> None:
    def slow(item: tuple[int, int]) -> tuple[int, int]:
        time.sleep(item[1] * 1e-5)
        return item

    assert list(ReadAhead(iter(enumerate(items)), [slow] * workers, ahead)) == list(enumerate(items))


def test_no_more_than_so_many_are_worked_on_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    results = ReadAhead(items(), [str] * 3, ahead=4)
    assert next(results) == "0"
    deadline = time.monotonic() + 5
    while len(taken) < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert len(taken) == 5  # four that wait, and the one that was taken
    results.close()


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_comes_after_the_results_before_it_and_stays(workers: int) -> None:
    def items() -> Iterator[int]:
        yield from (1, 2, 0, 4)
        raise OSError("the end of the disk")

    results = ReadAhead(items(), [lambda item: 4 // item] * workers, ahead=10)
    assert [next(results), next(results)] == [4, 2]
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            next(results)
    results.close()
    results = ReadAhead(items(), [str] * workers, ahead=10)
    assert [next(results) for _ in range(4)] == ["1", "2", "0", "4"]
    with pytest.raises(OSError, match="the end of the disk"):
        next(results)
    results.close()


def test_closing_ends_threads_that_wait_and_the_generator_they_read() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(1_000)
        finally:
            closed.set()

    before = set(threading.enumerate())
    results = ReadAhead(items(), [str] * 2, ahead=3)
    assert next(results) == "0"
    results.close()
    results.close()
    assert set(threading.enumerate()) == before
    del results
    assert closed.wait(5)
