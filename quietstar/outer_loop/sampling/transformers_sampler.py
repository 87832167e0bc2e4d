"""Sampling through transformers: one decoding loop for all kinds of prompts, with a random stream for each sample."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quietstar.data.encoding import encode_prompt
from quietstar.errors import NonFiniteError, OutOfMemoryError
from quietstar.inference.draw import draw, uniforms
from quietstar.outer_loop.options import SamplingOptions
from quietstar.outer_loop.sampling.decoding import Decoding
from quietstar.outer_loop.sampling.requests import Generation, Request, batches_by_length, check_lengths
from quietstar.outer_loop.sampling.text import CompletionText, ending_tokens
from quietstar.training.out_of_memory import is_out_of_memory

LEAST_DROPPED = 1 / 8
"""Share of the rows that must have ended before they are dropped, since dropping copies the cache."""


class TransformersSampler:
    """Samples from a causal language model of transformers, unmodified.

    What a request gives depends on its prompt, its seed and the model alone, up to the rounding of numbers, which the
    other rows of a batch may change. The same batch therefore gives the same completions on the same machine.

    Args:
        model: On its device, in evaluation mode.
        tokenizer: The model's.
        options: Of the sampling.
        stop: Strings that end a completion.

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
        self._ending = ending_tokens(tokenizer, model.generation_config)
        self._context = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indices of requests that are sampled together, shortest prompts first.

        Raises:
            DataError: A prompt has no tokens, or is too long for the model's context.
        """
        return batches_by_length(self._encode(requests), self.options.batch_size)

    def sample(self, requests: Sequence[Request]) -> list[Generation]:
        """Completions of one batch, in its order. Where memory runs out, half as many are sampled at a time.

        Raises:
            DataError: A prompt has no tokens, or is too long for the model's context.
            NonFiniteError: The model's predictions are not numbers.
            OutOfMemoryError: Not even one completion at a time fits.
        """
        prompts = self._encode(requests)
        found: list[Generation] = []
        size = len(requests)  # tried anew for each batch, so that what a batch gives depends on no other
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
            # outside the handler, whose traceback keeps the tensors that have to go
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
        known: dict[str, tuple[int, ...]] = {}
        for request in requests:
            if request.prompt not in known:
                known[request.prompt] = tuple(encode_prompt(self.tokenizer, request.prompt))
        prompts = [known[request.prompt] for request in requests]
        check_lengths(requests, prompts, self.options.max_new_tokens, self._context)
        return prompts

    def _sample(self, requests: Sequence[Request], prompts: Sequence[tuple[int, ...]]) -> list[Generation]:
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
            for row, new, change in zip(rows, token.tolist(), logprob.tolist(), strict=True):
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

    def _generation(self, prompt: Sequence[int], completion: Sequence[int], logprob: float) -> Generation:
        ended = completion[-1] in self._ending
        text, stopped = self._text.decode(prompt, completion[:-1] if ended else completion)
        return Generation(text, logprob, len(completion), "stop" if ended or stopped else "length")


def _free_cached_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
