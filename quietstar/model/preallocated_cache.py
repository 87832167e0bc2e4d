"""A KV cache with memory for tokens to come, so that a new token is written without copying all others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from quietstar.model.upstream import DynamicLayer, DynamicSlidingWindowLayer

GROWTH = 256
"""Fewest tokens of room that are added when a text outgrows its memory; a quarter of the text where this is more."""


class PreallocatedLayer(DynamicLayer):
    """A cache layer that keeps all tokens; keys and values are the filled part of memory that was allocated at once.

    Args:
        capacity: Number of tokens that there is room for at first.
    """

    def __init__(self, capacity: int = 0) -> None:
        DynamicLayer.__init__(self)
        self.capacity = capacity
        self._memory: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends new keys and values, [B, Hkv, n, D], and returns all of them."""
        return self.append(key_states, value_states)

    def append(self, key: Tensor, value: Tensor, rows: Tensor | None = None, batch: int = 0) -> tuple[Tensor, Tensor]:
        """Appends new keys and values of some rows, and returns all of them; the other rows hold meaningless values.

        Args:
            key, value: New keys and values, [len(rows), Hkv, n, D].
            rows: Indices of the rows in the batch, int64; None: all rows.
            batch: Number of rows of the batch, where `rows` is given.
        """
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        begin = self.get_seq_length()
        end = begin + key.shape[-2]
        if not self._memory or end > self.capacity:
            self._grow((key, value), key.shape[0] if rows is None else batch, begin, end)
        for memory, states in zip(self._memory, (key, value), strict=True):
            if rows is None:
                memory[:, :, begin:end] = states
            else:
                memory[rows, :, begin:end] = states
        return self._fill(end)

    def truncate(self, length: int) -> None:
        """Forgets all but the first tokens."""
        if self.is_initialized:
            self._fill(length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces the rows by those with these indices, int64; an index may occur several times."""
        if not self.is_initialized:
            return
        length = self.get_seq_length()
        memory, self._memory = self._memory, []
        for index, old in enumerate(memory):
            new = self._room(old, len(beam_idx))
            torch.index_select(old[:, :, :length], 0, beam_idx, out=new[:, :, :length])
            self._memory.append(new)
            memory[index] = new  # frees the old keys before the values are copied
        self._fill(length)

    def _grow(self, like: tuple[Tensor, Tensor], rows: int, length: int, least: int) -> None:
        if least > self.capacity:
            self.capacity = least if not self.capacity else least + max(GROWTH, least // 4)
        for index, states in enumerate(like):
            new = self._room(states, rows)
            if self._memory and length:
                new[:, :, :length] = self._memory[index][:, :, :length]
            self._memory[index : index + 1] = [new]

    def _room(self, like: Tensor, rows: int) -> Tensor:
        with torch.inference_mode(False):  # so that a text can be continued outside inference mode
            shape = (rows, like.shape[1], self.capacity, like.shape[-1])
            return torch.empty(shape, dtype=like.dtype, device=like.device)

    def _fill(self, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (memory[:, :, :length] for memory in self._memory)
        self.keys, self.values = keys, values
        return keys, values


def preallocated_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """Returns the cache that a model's configuration asks for, with preallocated layers where there is no window."""
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def keeps_keys(cache: DynamicCache) -> bool:
    """Returns whether any layer keeps keys and values; models with a recurrent state alone read padding as text."""
    return not cache.layers or any(isinstance(layer, DynamicLayer) for layer in cache.layers)


def sees_all(cache: DynamicCache, length: int) -> bool:
    """Returns whether every layer sees all tokens of a text of this length, wherever the padding is.

    A sliding window counts places of the cache, so padding between a shared prefix and the rest would narrow it.
    """
    return all(
        type(layer) is PreallocatedLayer
        or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= length)
        for layer in cache.layers
    )
