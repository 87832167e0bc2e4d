"""The order of the texts is a permutation per epoch, seeded, and needs no state."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quietstar.data.batches import BatchOrder, _mix


@given(n=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 2**70), epochs=st.integers(1, 3))
def test_every_text_comes_once_per_epoch(n: int, batch_size: int, seed: int, epochs: int) -> None:
    order = BatchOrder(n, batch_size, seed)
    steps = -(-epochs * n // batch_size)
    seen = [index for step in range(steps) for index in order.indices(step)]
    for epoch in range(epochs):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(n=st.integers(1, 30), batch_size=st.integers(1, 10), seed=st.integers(0, 9), steps=st.lists(st.integers(0, 200)))
def test_a_batch_depends_on_seed_and_step_only(n: int, batch_size: int, seed: int, steps: list[int]) -> None:
    used = BatchOrder(n, batch_size, seed)
    for step in steps:
        assert used.indices(step) == BatchOrder(n, batch_size, seed).indices(step)


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = [tuple(BatchOrder(50, 50, seed).indices(epoch)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == len(orders)


def test_the_order_is_the_same_everywhere() -> None:
    """A recorded order: if it changed, a resumed run would silently go on with other texts."""
    order = BatchOrder(10, 5, 1234)
    assert order.indices(0) + order.indices(3) == [9, 2, 7, 6, 1, 6, 1, 2, 0, 9]


def test_the_hash_is_splitmix64() -> None:
    """Against the first number of the published generator for the seed of its usual test vector."""
    assert _mix(np.array([1234567], dtype=np.uint64)).tolist() == [6457827717110365317]


def test_batches_are_unbiased() -> None:
    """Each text is equally often in each place; the bound is chi-square's 0.9999 quantile at 9 degrees of freedom."""
    counts = [[0] * 4 for _ in range(4)]
    rounds = 4000
    order = BatchOrder(4, 4, 0)
    for epoch in range(rounds):
        for place, text in enumerate(order.indices(epoch)):
            counts[place][text] += 1
    expected = rounds / 4
    assert sum((count - expected) ** 2 / expected for row in counts for count in row) < 33.7


@pytest.mark.parametrize(("n", "batch_size"), [(0, 1), (1, 0)])
def test_nothing_to_order(n: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BatchOrder(n, batch_size, 0)


def test_a_negative_step() -> None:
    with pytest.raises(ValueError, match="step must be at least 0"):
        BatchOrder(3, 1, 0).indices(-1)
