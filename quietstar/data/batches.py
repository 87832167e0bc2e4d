"""Batches of texts, as a trainer reads them, in an order that is a pure function of the seed and the step."""

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
        tokens: Token ids of the texts, int64 [B, L].
        attention_mask: Number of each token's document within its text, 1, 2, ..., and 0 at padding; int64 [B, L]. No
            document sees another. None: one document per text and no padding.
        names: Name of each text in messages.
        first: Place of the first text among the texts of the step, from 0.
        step: All texts of the step, where this batch is only a part of them; None where it is the whole step.
        loss_mask: Mask of the tokens that are learned, bool [B, L]; None learns all but the first of a document.
        values: Numbers that belong to each text, such as its label, float32 [B, ...].
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
        """Returns `size` texts of a whole step, from text `first` on."""
        chosen = slice(first, first + size)
        rest = {name: tensor[chosen] for name, tensor in self._optional().items()}
        return replace(self, tokens=self.tokens[chosen], names=self.names[chosen], first=first, step=self, **rest)

    def to(self, device: torch.device) -> Batch:
        """Returns the same batch on a device."""
        rest = {name: tensor.to(device) for name, tensor in self._optional().items()}
        return replace(self, tokens=self.tokens.to(device), **rest)

    def _optional(self) -> dict[str, Any]:
        """Returns those of the optional tensors that the batch has."""
        tensors = {"attention_mask": self.attention_mask, "loss_mask": self.loss_mask, "values": self.values}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


class Batches(Protocol):
    """Source of the texts of each optimizer step, in an order that is the same in every run."""

    @property
    def skipped(self) -> int:
        """Number of rows of the data that could not be used so far."""

    @property
    def special(self) -> int:
        """Number of times that the data had the text of a special token so far."""

    def batch(self, step: int) -> Batch:
        """Returns the texts of optimizer step `step`, counted from 1. Steps are asked for one after another."""

    def fingerprint(self) -> dict[str, Any]:
        """Returns plain JSON values that differ where the texts, or their order, differ."""

    def state_dict(self) -> dict[str, Any]:
        """Returns plain JSON values: where the step after the last one asked for continues."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken."""

    def close(self) -> None:
        """Closes files and ends threads; the next batch opens them again."""


class IndexedBatches:
    """Texts in memory, in the order of `BatchOrder`; the step is the only state.

    Args:
        tokens: Token ids of all texts, int64 [n, L].
        batch_size: Number of texts per optimizer step.
        seed: Seed of the order of the texts.
        attention_mask: Document numbers of all tokens, 0 at padding, int64 [n, L]; None: one document each, unpadded.
        skipped: Number of rows of the data that could not be used.
        loss_mask: Mask of the tokens that are learned, bool [n, L]; None learns all but the first of a document.
        values: Numbers that belong to each text, float32 [n, ...].
        special: Number of times that the data has the text of a special token.

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
        special: int = 0,
    ) -> None:
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or not tokens.numel():
            raise DataError(f"train_data: got {tokens.dtype} {list(tokens.shape)}, needs int64 [n, L] and one text")
        self._tokens = tokens
        given = {"attention_mask": attention_mask, "loss_mask": loss_mask, "values": values}
        self._optional = {name: tensor for name, tensor in given.items() if tensor is not None}
        self._order = BatchOrder(len(tokens), batch_size, seed)
        self._fingerprint: dict[str, Any] | None = None
        self.skipped = skipped
        self.special = special

    def batch(self, step: int) -> Batch:
        """Returns the texts of optimizer step `step`, counted from 1."""
        texts = self._order.indices(step - 1)
        names = [f"text {text} of the training data" for text in texts]
        rest: dict[str, Any] = {"attention_mask": None} | {name: own[texts] for name, own in self._optional.items()}
        return Batch(self._tokens[texts], names=names, **rest)

    def fingerprint(self) -> dict[str, Any]:
        """Returns the shape and a hash of all texts."""
        if self._fingerprint is None:
            digest = hashlib.sha256(self._tokens.contiguous().cpu().numpy().data)
            for tensor in self._optional.values():
                digest.update(tensor.contiguous().cpu().numpy().data)
            self._fingerprint = {"shape": list(self._tokens.shape), "sha256": digest.hexdigest()}
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state: the step determines the batch."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Does nothing: there is no state."""

    def close(self) -> None:
        """Does nothing: there are no files or threads to release."""


class BatchOrder:
    """A seeded permutation of the texts per epoch, cut into batches; a batch may span the end of an epoch.

    There is no state: the step alone determines the batch, so a resumed run sees exactly the texts that it would have
    seen without the interruption.

    Args:
        n: Number of texts in an epoch, at least 1.
        batch_size: Number of texts per batch, at least 1.
        seed: Seed of the order.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        if n < 1 or batch_size < 1:
            raise ValueError(f"n and batch_size must be at least 1, got {n} and {batch_size}")
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def places(self, step: int) -> list[tuple[int, int]]:
        """Returns the epoch and the text, both from 0, of each place in the batch at a step, counted from 0."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        first = step * self.batch_size
        epochs = [divmod(place, self.n) for place in range(first, first + self.batch_size)]
        return [(epoch, int(self._order(epoch)[place])) for epoch, place in epochs]

    def indices(self, step: int) -> list[int]:
        """Returns the indices of the texts of the batch at a step, counted from 0."""
        return [text for _, text in self.places(step)]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:
                self._epochs.clear()  # a batch spans at most two epochs, unless it is larger than the data
            self._epochs[epoch] = permutation(self.n, self.seed, epoch)
        return self._epochs[epoch]


def permutation(n: int, *key: int) -> NDArray[np.int64]:
    """Returns a permutation of 0 .. n - 1, int64 [n], for a key of integers such as seed and epoch.

    It sorts a hash in integer arithmetic, so the result is the same with every version of every library.
    """
    return np.argsort(_mix(_hash(key) + np.arange(n, dtype=np.uint64)), kind="stable")


def draw(n: int, *key: int) -> int:
    """Returns one of 0 .. n - 1 for a key of integers; the bias of the remainder is below n / 2^64."""
    return int(_hash(key)[0]) % n


def _hash(key: tuple[int, ...]) -> NDArray[np.uint64]:
    value = np.zeros(1, dtype=np.uint64)
    for number in key:
        value = _mix(value + np.uint64(number % 2**64))
    return value


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Applies the step of SplitMix64, which makes neighbouring numbers unrelated. Overflow wraps around as intended."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
