"""The state of a batch of texts that are being continued with thoughts.

What was thought while a text was generated.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quietstar.errors import DataError
from quietstar.model.draw import substream, uniforms
from quietstar.model.padding import read_padding
from quietstar.model.preallocated_cache import PreallocatedLayer
from quietstar.model.think_rule import ThinkRule
from quietstar.model.upstream import Cache


@dataclass
class ThinkingRecord:
    """Counts of a call of `generate`.

    Args:
        predictions: Next-token predictions made, in all rows that were still running.
        thought_at: How many of them had thoughts.
        seconds: Wall time of the call.
        thoughts: One entry for each new token, None where no row thought; empty unless they were asked for.
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
        """New tokens of all rows in a second of wall time, the pass over the prompt included."""
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
        when: Where.
        thoughts_per_token: K.
        temperature: Of thoughts; 0: greedy.
        seeds: Of thoughts, and of the text where `draw_text`: of each prompt, or one for all of them.
        draw_text: Draw the text from the rows' own streams.
        keep_thoughts: In `record`.
        scores: [B, V] that each token was drawn from, where they are asked for.
        record: What was done.
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
    """Keys and values of the texts alone, and what their thoughts need: the cache of a thinking model.

    Thoughts are put behind the text and dropped again, so that between two calls it holds nothing but the text. Layers
    keep every token, those that see a window too: the masks are the passes' own.

    Args:
        thinking: How to think.

    Attributes:
        text_length: Tokens stored for each row, left padding included.
        start: int64 [B], the first token of each text, or None where no row is padded.
        ids: int64 [B, text_length], what is stored.
        finished: bool [B], rows that have ended in this call.
    """

    def __init__(self, thinking: Thinking) -> None:
        super().__init__(layer_class_to_replicate=PreallocatedLayer)
        self.thinking = thinking
        self.text_length = 0
        self.start: Tensor | None = None
        self.ids: Tensor | None = None
        self.finished: Tensor | None = None
        self._prompt_length = 0
        self._seeds: list[int] = []

    def begin(self, thinking: Thinking) -> None:
        """Goes on with another call of `generate`: what was read stays."""
        self.thinking = thinking
        self.finished, self._seeds = None, []

    @property
    def index(self) -> int:
        """Which new token of this call comes next, from 0."""
        return self.text_length - self._prompt_length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the text that are stored; thoughts are never counted."""
        return self.text_length

    def open(self, prompt: Tensor, attention_mask: Tensor | None) -> None:
        """Takes in the rows that a call goes on with.

        Args:
            prompt: int64 [B, L], the whole texts, those tokens too that are stored already.
            attention_mask: [B, L] or None.

        Raises:
            DataError: A text is padded on the right, has a gap, or does not go on with what is stored.
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
        self._prompt_length = length
        self._seeds = self._row_seeds(prompt)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=prompt.device)

    @property
    def batch(self) -> int:
        """Rows of the present call."""
        return len(self._seeds)

    @property
    def is_open(self) -> bool:
        """Whether the rows of the present call are known."""
        return bool(self._seeds)

    def read(self, tokens: Tensor) -> None:
        """Takes in tokens, int64 [B, n], that are about to be stored."""
        self.text_length += tokens.shape[1]
        self.ids = tokens if self.ids is None else torch.cat([self.ids, tokens], dim=1)

    def end(self, rows: Tensor) -> None:
        """Nothing is thought any more in these rows, bool [B]."""
        assert self.finished is not None
        self.finished = self.finished | rows

    def draws(self, count: int) -> Tensor:
        """float64 [B, count] in [0, 1) for the next token of each row: the first for the token, the rest for thoughts.

        More of them begin with the same numbers.
        """
        return uniforms([substream(seed, self.index) for seed in self._seeds], count)

    def _row_seeds(self, prompt: Tensor) -> list[int]:
        """A stream for each row from what it is, not where: the seed given, its prompt, and which of equals it is."""
        given = self.thinking.seeds
        starts = [0] * len(prompt) if self.start is None else self.start.tolist()
        seen: Counter[tuple[int, tuple[int, ...]]] = Counter()
        seeds = []
        for row, (tokens, start) in enumerate(zip(prompt.tolist(), starts, strict=True)):
            text = tuple(tokens[start:])
            seed = given[row * len(given) // len(prompt)]  # several sequences of a prompt stand side by side
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
        """The memory of a layer."""
        while len(self.layers) <= index:
            self.layers.append(PreallocatedLayer())
        layer = self.layers[index]
        assert isinstance(layer, PreallocatedLayer)
        return layer

    def drop_thoughts(self) -> None:
        """Forgets everything but the text."""
        for index in range(len(self.layers)):
            self.layer(index).truncate(self.text_length)

    # -- what transformers lets users do with a cache ------------------------------------------------------------------

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes these rows, int64, its rows; one may come several times."""
        for index in range(len(self.layers)):
            self.layer(index).reorder_cache(beam_idx)
        self.ids = None if self.ids is None else self.ids[beam_idx]
        self.start = None if self.start is None else self.start[beam_idx]
        self.begin(self.thinking)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows, int64."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Makes several rows of each, side by side."""
        if self.ids is not None:
            rows = torch.arange(len(self.ids), device=self.ids.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -`tokens_to_remove` tokens, a number below 0 as in transformers."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: got {tokens_to_remove}, needs 0 or less: minus the tokens to forget")
        self.text_length = max(0, self.text_length + tokens_to_remove)
        self.ids = None if self.ids is None or not self.text_length else self.ids[:, : self.text_length]
        self.drop_thoughts()
        self.begin(self.thinking)

    def reset(self) -> None:
        """Forgets everything, the number of rows too."""
        self.layers, self.text_length, self.ids, self.start = [], 0, None, None
        self.begin(self.thinking)


@dataclass(frozen=True)
class TokenThoughts:
    """The thoughts in front of one new token of each row.

    Args:
        rows: int64 [R], the rows that were thought about.
        tokens: int64 [R, K, T].
        mixing_weight: float32 [R, K].
    """

    rows: Tensor
    tokens: Tensor
    mixing_weight: Tensor

    def cpu(self) -> TokenThoughts:
        """The same where it is read without waiting for a device at each row."""
        return TokenThoughts(self.rows.cpu(), self.tokens.cpu(), self.mixing_weight.cpu())
