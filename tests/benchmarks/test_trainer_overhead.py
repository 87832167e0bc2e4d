"""The trainer's own cost."""

from __future__ import annotations

import time

import pytest

from benchmarks.trainer_overhead import (
    EVALUATION,
    FORWARD_AND_BACKWARD,
    OPTIMIZER,
    REST,
    STARTUP_LIMIT,
    Clock,
    outside,
    run,
    startup_seconds,
    table,
)


def test_the_parts_of_a_run_are_its_whole_time() -> None:
    begun = time.process_time()
    seconds = run(1)
    elapsed = time.process_time() - begun
    assert all(value > 0 for value in seconds.values())
    assert seconds[FORWARD_AND_BACKWARD] > seconds[OPTIMIZER]
    assert sum(seconds.values()) < elapsed
    assert "100.00%" in table(seconds)


def test_the_clock_counts_what_it_is_told() -> None:
    clock = Clock()

    def work() -> int:
        return sum(range(3_000_000))

    begun = time.thread_time()
    assert clock.timed(OPTIMIZER, work)() == work()
    both = time.thread_time() - begun
    assert 0 < clock.seconds[OPTIMIZER] < both
    assert clock.seconds[EVALUATION] == 0


def test_evaluations_and_everything_else_are_outside() -> None:
    assert outside({FORWARD_AND_BACKWARD: 80, OPTIMIZER: 15, EVALUATION: 3, REST: 2}) == pytest.approx(0.05)


def test_help_starts_quickly() -> None:
    assert startup_seconds(1) < STARTUP_LIMIT
