"""A KV cache with room for the tokens to come, so that a new token is written without copying all others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class RoomyLayer(DynamicLayer):
    """A layer that sees everything; its keys and values are the filled part of memory taken at once.

    Args:
        capacity: Tokens that a row comes to at most.
    """

    def __init__(self, capacity: int) -> None:
        DynamicLayer.__init__(self)
        self.capacity = capacity
        self._memory: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Puts new keys and values, [B, Hkv, n, D], behind the others and returns them all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._memory = [self._room(states, states.shape[0]) for states in (key_states, value_states)]
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        for memory, states in zip(self._memory, (key_states, value_states), strict=True):
            memory[:, :, begin:end] = states
        return self._fill(end)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes these rows, int64, its rows; one may come several times."""
        if not self.is_initialized:
            return
        length = self.get_seq_length()
        memory, self._memory = self._memory, []
        for index, old in enumerate(memory):
            new = self._room(old, len(beam_idx))
            torch.index_select(old[:, :, :length], 0, beam_idx, out=new[:, :, :length])
            self._memory.append(new)
            memory[index] = new  # lets go of the old keys before the values are copied
        self._fill(length)

    def _room(self, like: Tensor, rows: int) -> Tensor:
        return like.new_empty(rows, like.shape[1], self.capacity, like.shape[-1])

    def _fill(self, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (memory[:, :, :length] for memory in self._memory)
        self.keys, self.values = keys, values
        return keys, values


def roomy_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """The cache that a model's configuration asks for, with room in all layers that see everything."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def sees_all(cache: DynamicCache, length: int) -> bool:
    """Whether every layer sees all tokens of a text so long, wherever the padding stands.

    A window counts places of the cache, padding too: between a shared prefix and the rest it would narrow the window.
    """
    return all(
        type(layer) is RoomyLayer or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= length)
        for layer in cache.layers
    )
