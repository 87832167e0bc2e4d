"""Sampling through transformers, with a random stream for each sample.

`TransformersSampler` is read first: one decoding loop for all kinds of prompts. `Decoding` is its state: the rows that
the model continues token by token, in one KV cache.
"""

from __future__ import annotations

import gc
import inspect
import math
import warnings
from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quietstar.config.sampling import SamplingOptions
from quietstar.data.examples import end_of_sequence
from quietstar.errors import ConfigError, NonFiniteError, OutOfMemoryError
from quietstar.model.cache import keeps_keys, preallocated_cache, sees_all
from quietstar.model.draw import draw, uniforms
from quietstar.model.loading import ending_tokens
from quietstar.model.upstream import cache_argument
from quietstar.runs.machine import is_out_of_memory
from quietstar.sampling.requests import (
    Completion,
    CompletionText,
    Request,
    batches_by_length,
    encode_requests,
)

LEAST_DROPPED = 1 / 8
"""Smallest share of ended rows at which they are dropped, because dropping copies the cache."""

LEAST_PREFIX = 16
"""Fewest tokens that all prompts must begin with for these tokens to get a separate pass."""


class TransformersSampler:
    """Samples from an unmodified causal language model of transformers.

    The completion of a request depends only on the prompt, the seed and the model, except for rounding, which the other
    rows of a batch may change. So the same batch gives the same completions on the same machine.

    Args:
        model: Causal language model on its device, in evaluation mode.
        tokenizer: Tokenizer of the model.
        options: Sampling options, such as the temperature and the batch size.
        stop: Strings that end a completion, besides the end-of-sequence token.

    Raises:
        ConfigError: The tokenizer has no end-of-sequence token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: SamplingOptions,
        stop: Sequence[str] = (),
    ) -> None:
        self.tokenizer, self.options = tokenizer, options
        self._model: PreTrainedModel | None = model
        self._text = CompletionText(tokenizer, stop)
        end_of_sequence(tokenizer)
        config = model.config.get_text_config()
        self._ending = set(ending_tokens(tokenizer, config.vocab_size, model.generation_config, config))
        self._context = getattr(config, "max_position_embeddings", None)

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Returns the indices of requests that are sampled together, shortest prompts first.

        Raises:
            DataError: A prompt has no tokens, or is too long for the model's context.
        """
        return batches_by_length(self._encode(requests), self.options.batch_size)

    def complete(self, requests: Sequence[Request], done: Container[int] = ()) -> Iterator[dict[int, Completion]]:
        """Samples the completions that are missing, batch by batch; see `Sampler`.

        A batch of which a part is there already is sampled again as a whole, so that it is the same.
        """
        for batch in self.batches(requests):
            missing = [index for index in batch if index not in done]
            if missing:
                found = dict(zip(batch, self.sample([requests[index] for index in batch]), strict=True))
                yield {index: found[index] for index in missing}

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """Samples completions of one batch, in its order. Where memory runs out, half as many are sampled at a time.

        Raises:
            DataError: A prompt has no tokens, or is too long for the model's context.
            NonFiniteError: The model's predictions are NaN or infinite.
            OutOfMemoryError: The memory is not enough for one completion at a time.
        """
        prompts = self._encode(requests)
        found: list[Completion] = []
        size = len(requests)  # tried again for each batch, so that a batch's completions do not depend on other batches
        while len(found) < len(requests):
            size = min(size, len(requests) - len(found))
            part = slice(len(found), len(found) + size)
            try:
                with torch.inference_mode():
                    found += self._sample(requests[part], prompts[part])
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                problem = str(error).split("\n")[0][:300]
            # outside the handler, because the traceback keeps the tensors that have to be freed
            _free_cached_memory()
            if size == 1:
                raise OutOfMemoryError(
                    f"{requests[part][0].name}: out of memory with this completion alone, {len(prompts[part][0])} "
                    f"tokens and up to {self.options.max_new_tokens} new ones ({problem}). Lower "
                    "sampling.max_new_tokens, use fewer solved examples, or take a smaller model.dtype"
                )
            warnings.warn(
                f"sampling.batch_size: out of memory with {size} completions at once ({problem}): {size // 2} at a "
                "time in the rest of this batch; a smaller one saves the attempt",
                stacklevel=2,
            )
            size //= 2
        return found

    def close(self) -> None:
        """Frees the model."""
        self._model = None
        gc.collect()
        _free_cached_memory()

    def _encode(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        return encode_requests(self.tokenizer, requests, self.options.max_new_tokens, self._context)

    def _sample(self, requests: Sequence[Request], prompts: Sequence[tuple[int, ...]]) -> list[Completion]:
        assert self._model is not None, "the sampler has been closed"
        options, limit = self.options, self.options.max_new_tokens
        unlike = list(dict.fromkeys(prompts))
        place = {prompt: index for index, prompt in enumerate(unlike)}
        state = Decoding(self._model, unlike, [place[prompt] for prompt in prompts], limit)
        device = state.logits.device
        uniform = uniforms([request.seed for request in requests], limit).to(device)

        completions: list[list[int]] = [[] for _ in requests]
        logprobs = [0.0] * len(requests)
        rows = list(range(len(requests)))  # which request each row of `state` belongs to
        running = set(rows)
        for step in range(limit):
            token, logprob = draw(
                state.logits,
                uniform[:, step],
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
            )
            drawn = torch.stack([token.double(), logprob.double()]).tolist()  # both with one wait for the device
            for row, new, change in zip(rows, map(int, drawn[0]), drawn[1], strict=True):
                if row not in running:
                    continue
                if not math.isfinite(change):
                    raise NonFiniteError(f"{requests[row].name}: the model's predictions are NaN or infinite")
                completions[row].append(new)
                logprobs[row] += change
                if new in self._ending or self._text.has_stop(completions[row]):
                    running.remove(row)
            if not running or step + 1 == limit:
                break
            if len(rows) - len(running) >= LEAST_DROPPED * len(rows):
                kept = [index for index, row in enumerate(rows) if row in running]
                state.keep(kept)
                token, uniform = token[kept], uniform[kept]
                rows = [rows[index] for index in kept]
            state.advance(token)
        return [
            self._generation(prompt, completion, total)
            for prompt, completion, total in zip(prompts, completions, logprobs, strict=True)
        ]

    def _generation(self, prompt: Sequence[int], completion: Sequence[int], logprob: float) -> Completion:
        ended = completion[-1] in self._ending
        text, stopped = self._text.decode(prompt, completion[:-1] if ended else completion)
        return Completion(text, logprob, len(completion), "stop" if ended or stopped else "length")


def _free_cached_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Decoding:
    """The state of a batch: `logits` for the next token of each row, which `advance` and `keep` update.

    Prompts are padded on the left. The beginning that all prompts share, such as solved examples, goes through the
    model once, and so does each prompt that several rows share.

    Args:
        model: Causal language model with a cache of transformers, on its device, in evaluation mode.
        prompts: Token ids of the prompts, all different and none empty.
        rows: Index of the prompt that each row of the batch continues.
        room: Largest number of tokens that a row is continued by.

    Attributes:
        logits: Logits of the next token of each row, [B, V] in the model's dtype.

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
        self.cache = preallocated_cache(model.config, longest + room)
        if name is None or not keeps_keys(self.cache):
            kind = model.config.model_type
            raise ConfigError(
                f"model.path: {kind} has no KV cache of the usual kind; take sampling.engine vllm or http"
            )
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
        self._mask = mask if any(padding) else None  # without a mask attention may be faster
        logits = self._forward(self._tensor(tokens), self._visible(), positions[:, shared:longest])
        index = self._select(rows)
        self.logits = logits[index]
        self._position = positions[index, longest]

    def advance(self, tokens: Tensor) -> None:
        """Appends a token to each row, int64 [B]."""
        self._length += 1
        self.logits = self._forward(tokens[:, None], self._visible(), self._position[:, None])
        self._position = self._position + 1

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all rows except those with these indices."""
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
        """Replaces the rows of the cache by those with these indices; an index may occur several times."""
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
    """Returns the number of tokens that all prompts begin with, at most all but one; 0 where it is not worth a pass."""
    if len(prompts) == 1:
        return 0
    least, most = min(prompts), max(prompts)  # all others lie between these in order, so they share their beginning
    end = min(map(len, prompts)) - 1
    count = next((index for index in range(end) if least[index] != most[index]), end)
    return count if count >= LEAST_PREFIX else 0
