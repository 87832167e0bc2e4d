"""Which texts make up which batch: a pure function of the seed and the step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class BatchOrder:
    """A seeded permutation of the texts per epoch, cut into batches; a batch may span the end of an epoch.

    There is no state: a run's position is its step, so that a resumed run sees the very texts that it would have seen.

    Args:
        n: Number of texts.
        batch_size: Texts per batch.
        seed: Another seed, another order.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        if n < 1 or batch_size < 1:
            raise ValueError(f"n and batch_size must be at least 1, got {n} and {batch_size}")
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def places(self, step: int) -> list[tuple[int, int]]:
        """Epoch and text, both from 0, of each place in the batch at a step, counted from 0."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        first = step * self.batch_size
        epochs = [divmod(place, self.n) for place in range(first, first + self.batch_size)]
        return [(epoch, int(self._order(epoch)[place])) for epoch, place in epochs]

    def indices(self, step: int) -> list[int]:
        """The texts of the batch at a step, counted from 0."""
        return [text for _, text in self.places(step)]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:
                self._epochs.clear()  # a batch needs two epochs at a time at most, unless the data is smaller than it
            self._epochs[epoch] = permutation(self.n, self.seed, epoch)
        return self._epochs[epoch]


def permutation(n: int, *key: int) -> NDArray[np.int64]:
    """A permutation of 0 .. n - 1 for a key of integers, such as seed and epoch.

    It sorts a hash in integer arithmetic, so it is the same with every version of every library.
    """
    return np.argsort(_mix(_hash(key) + np.arange(n, dtype=np.uint64)), kind="stable")


def draw(n: int, *key: int) -> int:
    """One of 0 .. n - 1 for a key of integers; the bias of the remainder is below n / 2^64."""
    return int(_hash(key)[0]) % n


def _hash(key: tuple[int, ...]) -> NDArray[np.uint64]:
    value = np.zeros(1, dtype=np.uint64)
    for number in key:
        value = _mix(value + np.uint64(number % 2**64))
    return value


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's step: neighbouring numbers become unrelated ones. Overflow wraps around, as it is meant to."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
