"""Rows of text that a causal language model continues token by token, on a KV cache that holds them all."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.errors import ConfigError
from quietstar.inference.roomy_cache import keeps_keys, roomy_cache, sees_all
from quietstar.model.upstream import cache_argument

LEAST_PREFIX = 16
"""Tokens that all prompts must begin with before they get a pass of their own."""


class Decoding:
    """The state of a batch: `logits` for the next token of each row, which `advance` and `keep` move on.

    Prompts are padded on the left. What they all begin with, such as solved examples, goes through the model once, and
    so does each prompt that several rows share.

    Args:
        model: Any causal language model with a cache of transformers' own, on its device, in evaluation mode.
        prompts: Token ids, each different from the others and not empty.
        rows: For each row of the batch, which prompt it continues.
        room: Most tokens that a row is continued by.

    Attributes:
        logits: [B, V] of the model's dtype.

    Raises:
        ConfigError: The model does not take a cache.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], rows: Sequence[int], room: int
    ) -> None:
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        name = cache_argument(model.forward)
        longest = max(map(len, prompts))
        self.cache = roomy_cache(model.config, longest + room)
        if name is None or not keeps_keys(self.cache):
            kind = model.config.model_type
            raise ConfigError(f"model.path: {kind} has no KV cache of the usual kind; set sampling.engine to vllm")
        self._cache_argument = name
        self._takes_positions = "position_ids" in accepted
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

        self._mask: Tensor | None = None
        shared = shared_prefix(prompts) if sees_all(self.cache, longest + room) else 0
        if shared:
            self._forward(self._tensor([prompts[0][:shared]]), None, torch.arange(shared)[None])
            self._select([0] * len(prompts))
        width = longest - shared
        padding = [longest - len(prompt) for prompt in prompts]
        tokens = [[0] * pad + list(prompt[shared:]) for pad, prompt in zip(padding, prompts, strict=True)]
        real = [[1] * shared + [0] * pad + [1] * (width - pad + room) for pad in padding]
        mask = self._tensor(real)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        self._length = longest
        self._mask = mask if any(padding) else None  # without padding attention may take a faster way
        logits = self._forward(self._tensor(tokens), self._visible(), positions[:, shared:longest])
        index = self._select(rows)
        self.logits = logits[index]
        self._position = positions[index, longest]

    def advance(self, tokens: Tensor) -> None:
        """Puts a token, int64 [B], behind each row."""
        self._length += 1
        self.logits = self._forward(tokens[:, None], self._visible(), self._position[:, None])
        self._position = self._position + 1

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all rows but these."""
        index = self._select(rows)
        self.logits, self._position = self.logits[index], self._position[index]

    def _forward(self, tokens: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        options = {**self._last_only, self._cache_argument: self.cache}
        if self._takes_positions:
            options["position_ids"] = positions.to(tokens.device)
        output = self.model(tokens, attention_mask=mask, use_cache=True, **options)
        logits: Tensor = output.logits[:, -1]
        return logits

    def _select(self, rows: Sequence[int]) -> Tensor:
        """Makes these rows of the cache its rows; one may come several times."""
        index: torch.LongTensor = self._tensor(rows)
        self.cache.reorder_cache(index)
        if self._mask is not None:
            self._mask = self._mask[index]
        return index

    def _visible(self) -> Tensor | None:
        return None if self._mask is None else self._mask[:, : self._length]

    def _tensor(self, values: Sequence[Any]) -> Any:
        return torch.tensor(values, device=self.model.device)


def shared_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all prompts begin with, at least one token of each left over; 0 where it is not worth a pass."""
    if len(prompts) == 1:
        return 0
    least, most = min(prompts), max(prompts)  # between these two in order, so all others begin as they do
    end = min(map(len, prompts)) - 1
    count = next((index for index in range(end) if least[index] != most[index]), end)
    return count if count >= LEAST_PREFIX else 0
