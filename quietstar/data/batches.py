"""Batches of texts in a fixed order: what a trainer reads.

Which texts make up which batch: a pure function of the seed and the step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quietstar.errors import DataError


@dataclass(frozen=True)
class Batch:
    """The texts of one optimizer step, or some of them.

    Args:
        tokens: int64 [B, L].
        attention_mask: int64 [B, L], 0 where there is padding, else 1, 2, ...: the token's document within its text,
            which sees no other document. None: one document a text and no padding.
        names: What each text is called in messages.
        first: Place of the first text among those of the step.
        step: All texts of the step, where these are a part of them.
        loss_mask: bool [B, L], True at the tokens that are learned; None: all that follow another.
        values: float32 [B, ...], numbers that belong to each text, such as its label.
    """

    tokens: Tensor
    attention_mask: Tensor | None
    names: Sequence[str]
    first: int = 0
    step: Batch | None = None
    loss_mask: Tensor | None = None
    values: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def step_size(self) -> int:
        """Number of texts in the step."""
        return len(self) if self.step is None else len(self.step)

    def part(self, first: int, size: int) -> Batch:
        """`size` of a whole step's texts, from `first` on."""
        chosen = slice(first, first + size)
        rest = {name: tensor[chosen] for name, tensor in self._optional().items()}
        return replace(self, tokens=self.tokens[chosen], names=self.names[chosen], first=first, step=self, **rest)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        rest = {name: tensor.to(device) for name, tensor in self._optional().items()}
        return replace(self, tokens=self.tokens.to(device), **rest)

    def _optional(self) -> dict[str, Any]:
        """The tensors that a batch need not have."""
        tensors = {"attention_mask": self.attention_mask, "loss_mask": self.loss_mask, "values": self.values}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


class Batches(Protocol):
    """Where the texts of each optimizer step come from, in an order that is the same in every run."""

    @property
    def skipped(self) -> int:
        """Rows of the data that could not be used, so far."""

    def batch(self, step: int) -> Batch:
        """The texts of optimizer step `step`, counted from 1. Steps are asked for one after another."""

    def fingerprint(self) -> dict[str, Any]:
        """Plain JSON values that differ where the texts, or their order, differ."""

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values: where the step after the last one asked for continues."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken."""

    def close(self) -> None:
        """Lets go of files and threads; the next batch takes them again."""


class IndexedBatches:
    """Texts in memory, in the order of `BatchOrder`: the position is the step, and there is no other state.

    Args:
        tokens: int64 [n, L].
        batch_size: Texts per optimizer step.
        seed: Of the order.
        attention_mask: As in `Batch`, [n, L].
        skipped: Rows of the data that could not be used.
        loss_mask: As in `Batch`, [n, L].
        values: As in `Batch`, [n, ...].

    Raises:
        DataError: `tokens` is not int64 [n, L] with at least one text.
    """

    def __init__(
        self,
        tokens: Tensor,
        batch_size: int,
        seed: int,
        attention_mask: Tensor | None = None,
        skipped: int = 0,
        loss_mask: Tensor | None = None,
        values: Tensor | None = None,
    ) -> None:
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or not tokens.numel():
            raise DataError(f"train_data: got {tokens.dtype} {list(tokens.shape)}, needs int64 [n, L] and one text")
        self._tokens = tokens
        given = {"attention_mask": attention_mask, "loss_mask": loss_mask, "values": values}
        self._optional = {name: tensor for name, tensor in given.items() if tensor is not None}
        self._order = BatchOrder(len(tokens), batch_size, seed)
        self._fingerprint: dict[str, Any] | None = None
        self.skipped = skipped

    def batch(self, step: int) -> Batch:
        """The texts of optimizer step `step`, counted from 1."""
        texts = self._order.indices(step - 1)
        names = [f"text {text} of the training data" for text in texts]
        rest: dict[str, Any] = {"attention_mask": None} | {name: own[texts] for name, own in self._optional.items()}
        return Batch(self._tokens[texts], names=names, **rest)

    def fingerprint(self) -> dict[str, Any]:
        """Shape and hash of all texts."""
        if self._fingerprint is None:
            digest = hashlib.sha256(self._tokens.contiguous().cpu().numpy().data)
            for tensor in self._optional.values():
                digest.update(tensor.contiguous().cpu().numpy().data)
            self._fingerprint = {"shape": list(self._tokens.shape), "sha256": digest.hexdigest()}
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the step says it all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take back."""

    def close(self) -> None:
        """Nothing to let go of."""


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
