"""The state of a batch of texts that are being continued with thoughts."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from quietstar.errors import DataError
from quietstar.inference.draw import substream, uniforms
from quietstar.inference.record import ThinkingRecord
from quietstar.inference.roomy_cache import RoomyLayer
from quietstar.inference.when import When
from quietstar.model.padding import read_padding


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
        ending: Tokens that end a row.
        record: What was done.
    """

    when: When
    thoughts_per_token: int = 1
    temperature: float = 0.0
    seeds: tuple[int, ...] = (0,)
    draw_text: bool = False
    keep_thoughts: bool = False
    ending: tuple[int, ...] = ()
    record: ThinkingRecord = field(default_factory=ThinkingRecord)


class ThinkingCache(Cache):
    """Keys and values of the texts alone, and what their thoughts need: `past_key_values` of a thinking model.

    Thoughts are put behind the text and dropped again, so that between two calls it holds nothing but the text. Layers
    keep every token, those that see a window too: the masks are the passes' own.

    Args:
        thinking: How to think.

    Attributes:
        text_length: Tokens stored for each row, left padding included.
        start: int64 [B], the first token of each text, or None where no row is padded.
    """

    def __init__(self, thinking: Thinking) -> None:
        super().__init__(layer_class_to_replicate=RoomyLayer)
        self.thinking = thinking
        self.text_length = 0
        self.start: Tensor | None = None
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
            DataError: A text is padded on the right, has a gap, or is shorter than what is stored of it.
        """
        batch, length = prompt.shape
        if length <= self.text_length:
            raise DataError(
                f"input_ids: got {length} tokens, but past_key_values holds {self.text_length}; give the whole text, "
                "with what was generated before"
            )
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
    def is_open(self) -> bool:
        """Whether the rows of the present call are known."""
        return bool(self._seeds)

    def read(self, tokens: Tensor) -> None:
        """Counts tokens, int64 [B, n], that are about to be stored."""
        assert self.finished is not None
        self.text_length += tokens.shape[1]
        ending = self.thinking.ending
        if self.index > 0 and ending and len(tokens) > 1:  # alone, a row that has ended ends the call
            ended = torch.isin(tokens[:, -1], torch.tensor(ending, device=tokens.device))
            self.finished = self.finished | ended

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

    def layer(self, index: int) -> RoomyLayer:
        """The memory of a layer."""
        while len(self.layers) <= index:
            self.layers.append(RoomyLayer())
        layer = self.layers[index]
        assert isinstance(layer, RoomyLayer)
        return layer

    def drop_thoughts(self) -> None:
        """Forgets everything but the text."""
        for layer in self.layers:
            assert isinstance(layer, RoomyLayer)
            layer.truncate(self.text_length)
