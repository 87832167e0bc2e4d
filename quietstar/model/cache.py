"""The state of a call of `generate` with thoughts.

`PreallocatedLayer` is a layer of a KV cache with memory for tokens to come, so that a new token is written without
copying all others. `Thinking` is what was asked for, `ThinkingRecord` what was done. `ThinkingCache` holds the keys and
values of the texts between two predictions, and the random stream of each row.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from quietstar.errors import DataError
from quietstar.model.draw import numbers_of, signed, substream
from quietstar.model.padding import read_padding
from quietstar.model.think_rule import ThinkRule
from quietstar.model.upstream import Cache, DynamicLayer, DynamicSlidingWindowLayer

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
        self._columns: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends new keys and values, [B, Hkv, n, D], and returns all of them."""
        return self.append(key_states, value_states)

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends new keys and values, [B, Hkv, n, D], and returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        begin = self.get_seq_length()
        end = begin + key.shape[-2]
        if not self._memory or end > self.capacity:
            self._grow((key, value), begin, end)
        for memory, states in zip(self._memory, (key, value), strict=True):
            memory[:, :, begin:end] = states
        return self._fill(end)

    def write(self, columns: Tensor, key: Tensor, value: Tensor, rows: Tensor | None) -> None:
        """Writes keys and values of some rows into columns that `reserve` has made; the length stays.

        Args:
            columns: Columns of the memory, int64 [n], on its device, so that the same launches write elsewhere later.
            key, value: Keys and values, [len(rows), Hkv, n, D].
            rows: Indices of the rows in the batch, int64; None: all rows.
        """
        for memory, given in zip(self._memory, (key, value), strict=True):
            states = given if given.dtype == memory.dtype else given.to(memory.dtype)
            if rows is None:
                memory.index_copy_(2, columns, states)
            else:
                memory[rows[:, None], :, columns] = states.transpose(1, 2)

    def reserve(self, count: int) -> None:
        """Makes room for `count` tokens in all."""
        if self.is_initialized and count > self.capacity:
            length = self.get_seq_length()
            self._grow(self._memory, length, count)
            self._fill(length)  # else keys and values would hold the old memory

    def clear(self, columns: Tensor) -> None:
        """Writes zeros into columns, int64 [n]: a mask gives them weight 0, and 0 times NaN is NaN."""
        for memory in self._memory:
            memory.index_fill_(2, columns, 0)

    def first(self, count: int) -> tuple[Tensor, Tensor]:
        """Returns the first columns of the memory, [B, Hkv, count, D] each: finite numbers where nothing is stored."""
        if self._columns is None or self._columns[0].shape[2] != count:
            keys, values = (memory[:, :, :count] for memory in self._memory)
            self._columns = keys, values
        return self._columns

    def truncate(self, length: int) -> None:
        """Forgets all but the first tokens."""
        if self.is_initialized:
            self._fill(length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces the rows by those with these indices, int64; an index may occur several times."""
        if not self.is_initialized:
            return
        length = self.get_seq_length()
        memory, self._memory, self._columns = self._memory, [], None
        for index, old in enumerate(memory):
            new = self._room(old, len(beam_idx))
            torch.index_select(old[:, :, :length], 0, beam_idx, out=new[:, :, :length])
            self._memory.append(new)
            memory[index] = new
            if index == 0:
                self.keys = new[:, :, :length]  # frees the old keys before the values are copied
        self._fill(length)

    def _grow(self, like: Sequence[Tensor], length: int, least: int) -> None:
        if least > self.capacity:
            self.capacity = with_room(least)
        self._columns = None
        for index, states in enumerate(tuple(like)):
            new = self._room(states, len(states))
            if self._memory and length:
                new[:, :, :length] = self._memory[index][:, :, :length]
            self._memory[index : index + 1] = [new]

    def _room(self, like: Tensor, rows: int) -> Tensor:
        with torch.inference_mode(False):  # so that a text can be continued outside inference mode
            shape = (rows, like.shape[1], self.capacity, like.shape[-1])
            # zeros, because a mask hides numbers, but not those that are none: 0 times NaN is NaN
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

    def _fill(self, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (memory[:, :, :length] for memory in self._memory)
        self.keys, self.values = keys, values
        return keys, values


def with_room(least: int) -> int:
    """Returns how many tokens to make room for where `least` are needed now and more may come."""
    return least + max(GROWTH, least // 4)


def preallocated_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """Returns the cache that a model's configuration asks for, with preallocated layers for those without a window."""
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


@dataclass(frozen=True)
class TokenThoughts:
    """The thoughts before one new token of each row.

    Args:
        rows: Rows that thought, int64 [R].
        tokens: Token ids of the thoughts, int64 [R, K, T].
        mixing_weight: Mixing weight of each thought, float32 [R, K].
    """

    rows: Tensor
    tokens: Tensor
    mixing_weight: Tensor

    def cpu(self) -> TokenThoughts:
        """Returns copies on the CPU, where reading a row does not wait for a device."""
        kept = (self.rows, self.tokens, self.mixing_weight)
        return TokenThoughts(*(tensor.to("cpu", copy=True) for tensor in kept))


@dataclass
class ThinkingRecord:
    """Counts, time and thoughts of a call of `generate`.

    Args:
        predictions: Number of next-token predictions, in all rows that were still running.
        thought_at: Number of predictions with thoughts.
        seconds: Wall time of the call, in seconds.
        thoughts: Thoughts before each new token, None if no row thought; empty unless they were asked for.
    """

    predictions: int = 0
    thought_at: int = 0
    seconds: float = 0.0
    thoughts: list[TokenThoughts | None] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of the new tokens that were thought about."""
        return self.thought_at / self.predictions if self.predictions else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows per second of wall time, which includes the pass over the prompt."""
        return self.predictions / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        return (
            f"{self.predictions} tokens in {self.seconds:.1f} s, {self.tokens_per_second:.1f} a second; "
            f"thought at {100 * self.share:.0f} % of them"
        )


@dataclass
class Thinking:
    """How `generate` was asked to think.

    Args:
        when: Rule that says which tokens are thought about.
        thoughts_per_token: Number of thoughts (K) before each token.
        temperature: Sampling temperature of thoughts; 0 takes the most probable tokens.
        seeds: Seeds of the thoughts, and of the text if `draw_text` is set: one for each prompt, or one for all.
        draw_text: Whether to draw the text from the rows' own random streams.
        keep_thoughts: Whether to keep the thoughts in `record`.
        scores: Scores that each token was drawn from, [B, V] for each token; empty unless they were asked for.
        record: Counts and thoughts of the call so far.
    """

    when: ThinkRule
    thoughts_per_token: int = 1
    temperature: float = 0.0
    seeds: tuple[int, ...] = (0,)
    draw_text: bool = False
    keep_thoughts: bool = False
    scores: list[Tensor] = field(default_factory=list)
    record: ThinkingRecord = field(default_factory=ThinkingRecord)


class ThinkingCache(Cache):
    """The cache of a thinking model: keys and values of the texts, and what thoughts about them need.

    Thoughts are put after the text and dropped again, so that between two predictions the cache holds only the text.
    Every layer keeps all tokens, even a layer with a sliding window: each pass makes its own masks.

    Args:
        thinking: Arguments of `generate` that concern thoughts.

    Attributes:
        text_length: Number of tokens stored for each row, left padding included.
        start: First token of each text, int64 [B]; None if no row is padded.
        least_padding: Fewest tokens of padding that a text has.
        finished: Rows that have ended in this call, bool [B]; None before the call's rows are known.
        decoding: What the passes over single tokens keep from one token to the next; None: nothing that still holds.
    """

    def __init__(self, thinking: Thinking) -> None:
        super().__init__(layer_class_to_replicate=PreallocatedLayer)
        self.thinking = thinking
        self.text_length = 0
        self.start: Tensor | None = None
        self.least_padding = 0
        self.finished: Tensor | None = None
        self.decoding: Any = None
        self._ids: Tensor | None = None
        self._prompt_length = 0
        self._seeds: list[int] = []
        self._state: tuple[int, Tensor] | None = None

    def begin(self, thinking: Thinking) -> None:
        """Prepares for another call of `generate`; the stored text stays."""
        self.thinking = thinking
        self.finished, self.decoding, self._seeds, self._state = None, None, [], None

    @property
    def ids(self) -> Tensor | None:
        """Token ids that are stored, int64 [B, text_length]; None if nothing is stored."""
        return None if self._ids is None or not self.text_length else self._ids[:, : self.text_length]

    @property
    def index(self) -> int:
        """Index of the next new token of this call, from 0."""
        return self.text_length - self._prompt_length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of stored tokens of the text; thoughts are never counted."""
        return self.text_length

    def open(self, prompt: Tensor, attention_mask: Tensor | None) -> None:
        """Takes in the rows that a call continues.

        Args:
            prompt: Token ids of the whole texts, those already stored included, int64 [B, L].
            attention_mask: Mask of the texts, [B, L], 0 for padding on the left; None: no padding.

        Raises:
            DataError: A text is padded on the right, has a gap, or does not begin with what is stored.
        """
        batch, length = prompt.shape
        self._check_continues(prompt)
        if self.text_length == 0 and attention_mask is not None:
            padding = read_padding(prompt, attention_mask)
            right = (~padding.token_mask[:, -1]).nonzero()
            if len(right):
                raise DataError(
                    f"attention_mask: row {int(right[0])} is padded on the right; texts that are to be continued are "
                    "padded on the left (tokenizer.padding_side = 'left')"
                )
            self.start = None if padding.start is None else padding.start.long()
            self.least_padding = 0 if self.start is None else int(self.start.min())
        self._prompt_length = length
        self._seeds = self._row_seeds(prompt)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=prompt.device)

    @property
    def batch(self) -> int:
        """Number of rows of the present call."""
        return len(self._seeds)

    @property
    def is_open(self) -> bool:
        """Whether the rows of the present call are known."""
        return bool(self._seeds)

    def read(self, tokens: Tensor) -> None:
        """Notes the ids of tokens, int64 [B, n], that are about to be stored."""
        begin, self.text_length = self.text_length, self.text_length + tokens.shape[1]
        if self._ids is None or self._ids.shape[1] < self.text_length:
            before = self.ids if begin else None
            with torch.inference_mode(False):
                shape = (len(tokens), with_room(self.text_length))
                self._ids = torch.zeros(shape, dtype=torch.int64, device=tokens.device)
            if before is not None:
                self._ids[:, :begin] = before[:, :begin]
        self._ids[:, begin : self.text_length] = tokens

    def end(self, rows: Tensor) -> None:
        """Marks rows, bool [B], as ended: they do not think any more."""
        assert self.finished is not None
        self.finished = self.finished | rows

    def running(self) -> Tensor | None:
        """Returns the rows that have not ended, int64, or None where these are all.

        For several rows the host waits. A single one is running: transformers ends the call with the last row.
        """
        if self.batch == 1:
            return None
        assert self.finished is not None
        rows = (~self.finished).nonzero()[:, 0]
        return None if len(rows) == self.batch else rows

    def draws(self, count: int) -> Tensor:
        """Returns random numbers for the next token of each row, float64 [B, count] in [0, 1), on the texts' device.

        The first number is for the token, the others are for thoughts. A larger `count` begins with the same numbers.
        """
        assert self.finished is not None
        if self._state is None:
            with torch.inference_mode(False):
                seeds = [signed(substream(seed, self.index)) for seed in self._seeds]
                self._state = self.index, torch.tensor(seeds, device=self.finished.device)
        index, state = self._state
        if index != self.index:
            state.add_(signed(substream(0, self.index - index - 1)))
            self._state = self.index, state
        return numbers_of(state, count)

    def _row_seeds(self, prompt: Tensor) -> list[int]:
        """Makes a seed for each row from the given seed, the prompt, and the row's number among equal prompts.

        It does not depend on the row's place in the batch.
        """
        given = self.thinking.seeds
        starts = [0] * len(prompt) if self.start is None else self.start.tolist()
        seen: Counter[tuple[int, tuple[int, ...]]] = Counter()
        seeds = []
        for row, (tokens, start) in enumerate(zip(prompt.tolist(), starts, strict=True)):
            text = tuple(tokens[start:])
            seed = given[row * len(given) // len(prompt)]  # several sequences of a prompt are neighbours
            key = repr((seed, seen[seed, text], text)).encode()
            seeds.append(int.from_bytes(hashlib.sha256(key).digest()[:8], "big"))
            seen[seed, text] += 1
        return seeds

    def _check_continues(self, prompt: Tensor) -> None:
        if self.ids is None:
            return
        if prompt.shape[0] != self.ids.shape[0]:
            raise DataError(
                f"input_ids: got {prompt.shape[0]} rows (num_return_sequences counted), but the cache holds "
                f"{self.ids.shape[0]}; see its batch_repeat_interleave and batch_select_indices"
            )
        if prompt.shape[1] <= self.text_length:
            raise DataError(
                f"input_ids: got {prompt.shape[1]} tokens, but the cache holds {self.text_length}; give the "
                "whole text, with what was generated before"
            )
        other = prompt[:, : self.text_length] != self.ids
        if self.start is not None:
            other &= torch.arange(self.text_length, device=other.device) >= self.start[:, None]
        if bool(other.any()):
            row, position = other.nonzero()[0].tolist()
            raise DataError(
                f"input_ids: row {row} has token {int(prompt[row, position])} at position {position}, where "
                f"the cache holds {int(self.ids[row, position])}; it was made from another text"
            )

    def layer(self, index: int) -> PreallocatedLayer:
        """Returns the memory of a layer."""
        while len(self.layers) <= index:
            self.layers.append(PreallocatedLayer())
        layer = self.layers[index]
        assert isinstance(layer, PreallocatedLayer)
        return layer

    def drop_thoughts(self) -> None:
        """Forgets everything but the text."""
        for index in range(len(self.layers)):
            self.layer(index).truncate(self.text_length)

    def reserve(self, count: int) -> None:
        """Makes room for `count` tokens in all layers."""
        for index in range(len(self.layers)):
            self.layer(index).reserve(count)

    # -- what transformers lets users do with a cache ------------------------------------------------------------------

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces the rows of the cache by those with these indices, int64; an index may occur several times."""
        for index in range(len(self.layers)):
            self.layer(index).reorder_cache(beam_idx)
        with torch.inference_mode(False):  # it is written to later
            self._ids = None if self._ids is None else self._ids[beam_idx]
        if self.start is not None:
            self.start = self.start[beam_idx]
            self.least_padding = int(self.start.min())
        self.begin(self.thinking)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows with these indices, int64."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row this many times, side by side."""
        if self._ids is not None:
            rows = torch.arange(len(self._ids), device=self._ids.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -`tokens_to_remove` tokens; as in transformers the number is negative.

        Raises:
            ValueError: The number is above 0.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: got {tokens_to_remove}, needs 0 or less: minus the tokens to forget")
        self.text_length = max(0, self.text_length + tokens_to_remove)
        self.drop_thoughts()
        self.begin(self.thinking)

    def reset(self) -> None:
        """Forgets everything, the number of rows too."""
        self.layers, self.text_length, self._ids, self.start, self.least_padding = [], 0, None, None, 0
        self.begin(self.thinking)
