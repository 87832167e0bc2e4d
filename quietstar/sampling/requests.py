"""Requests and completions, which are the same for every engine, and what the samplers share.

The functions and `CompletionText` after `Sampler` are for implementing one: seeds, prompts as tokens, checks of
lengths, batches, and the text of a completion up to its end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from transformers import PreTrainedTokenizerBase

from quietstar.data.tokenizer import encode_prompt
from quietstar.errors import DataError

TOKENS_PER_CHARACTER = 4
"""Largest number of tokens of a character: its bytes in UTF-8."""

SLACK = 8
"""Tokens decoded before those that can hold a stop string: special tokens and lost first spaces then do not matter."""


@dataclass(frozen=True)
class Request:
    """One completion of one prompt.

    Args:
        prompt: Text to continue; it is never cut.
        seed: Seed of this completion's own random stream; see `sample_seed`.
        name: Name of the request in error messages.
    """

    prompt: str
    seed: int
    name: str


@dataclass(frozen=True)
class Completion:
    """A sampled continuation of a prompt.

    Args:
        text: Text of the completion, without the end-of-sequence token, and without the stop string and all after it.
        logprob: Log-probability in nats: sum over the sampled tokens, the ending one included, under the model itself
            (temperature 1, every token allowed).
        tokens: Number of sampled tokens, the ending one included.
        finish_reason: Reason of the end: `stop` for an end-of-sequence token or a stop string, `length` for neither
            within the allowed number of tokens.
        endpoint: URL of the server that sampled the completion; None where this run has its own engine.
    """

    text: str
    logprob: float
    tokens: int
    finish_reason: Literal["stop", "length"]
    endpoint: str | None = None


class Sampler(Protocol):
    """A model that completes prompts."""

    def complete(self, requests: Sequence[Request], done: Container[int] = ()) -> Iterator[dict[int, Completion]]:
        """Samples the completions that are missing.

        Args:
            requests: All requests of a phase: how they are batched may depend on all of them.
            done: Indices of the requests whose completions are there already.

        Yields:
            Completions by index of their request, in parts, as they are finished: what has come is never sampled again.

        Raises:
            DataError: A prompt has no tokens, or is too long for the model's context.
        """
        ...

    def close(self) -> None:
        """Frees the model; the sampler cannot be used after that."""
        ...


def sample_seed(seed: int, *parts: int | str | bool) -> int:
    """Returns a sample's own seed, below 2^63, from the run's seed and what distinguishes the sample from all others.

    Args:
        seed: Seed of the run.
        parts: Values that distinguish the sample, such as the iteration, the problem's id, the sample's index and
            whether the hint was shown.
    """
    key = json.dumps([seed, *parts], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def encode_requests(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], max_new_tokens: int, context: int | None
) -> list[tuple[int, ...]]:
    """Returns the prompts of requests as token ids, after `check_lengths`.

    Args:
        tokenizer: Tokenizer of the model.
        requests: Requests with the prompts; equal ones are encoded once.
        max_new_tokens: Largest number of tokens in a completion.
        context: Number of tokens that the model can read; None: it has no limit.

    Raises:
        DataError: A prompt has no tokens, or does not fit with its completion.
    """
    known: dict[str, tuple[int, ...]] = {}
    for request in requests:
        if request.prompt not in known:
            known[request.prompt] = tuple(encode_prompt(tokenizer, request.prompt))
    prompts = [known[request.prompt] for request in requests]
    check_lengths(requests, prompts, max_new_tokens, context)
    return prompts


def check_lengths(
    requests: Sequence[Request], prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int | None
) -> None:
    """Checks that each prompt and its completion fit into the model's context.

    Args:
        requests: Requests of the prompts, whose names are used in error messages.
        prompts: Token ids of the prompt of each request.
        max_new_tokens: Largest number of tokens in a completion.
        context: Number of tokens that the model can read; None: it has no limit.

    Raises:
        DataError: A prompt has no tokens, or does not fit with its completion.
    """
    for request, prompt in zip(requests, prompts, strict=True):
        if not prompt:
            raise DataError(f"{request.name}: the prompt has no tokens, so there is nothing to continue")
        if context is not None and len(prompt) + max_new_tokens > context:
            raise DataError(
                f"{request.name}: its prompt of {len(prompt)} tokens and the {max_new_tokens} of "
                f"sampling.max_new_tokens do not fit into the model's context of {context}; a prompt is never cut: "
                "leave the problem out, lower sampling.max_new_tokens, or use fewer solved examples"
            )


def batches_by_length(prompts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Makes batches of prompts of similar length, so that there is little padding; equal prompts are neighbours."""
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), prompts[index], index))
    return [order[start : start + size] for start in range(0, len(order), size)]


class CompletionText:
    """Decodes completions, without special tokens.

    Args:
        tokenizer: Tokenizer of the model that samples.
        stop: Strings that end a completion.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(text for text in stop if text)
        longest = max(map(len, self.stop), default=0)
        self._window = TOKENS_PER_CHARACTER * longest + SLACK

    def decode(self, prompt: Sequence[int], completion: Sequence[int]) -> tuple[str, bool]:
        """Returns the text of a completion up to its first stop string, and whether it has one.

        The text is what the completion adds to that of the prompt: many decoders drop the first space of a completion
        that is decoded alone.
        """
        before, both = self._decode(prompt), self._decode([*prompt, *completion])
        text = both[len(before) :] if both.startswith(before) else self._decode(completion)
        ends = [position for position in (text.find(stop) for stop in self.stop) if position >= 0]
        return (text[: min(ends)], True) if ends else (text, False)

    def has_stop(self, completion: Sequence[int]) -> bool:
        """Returns whether the last tokens of a completion so far contain a stop string."""
        if not self.stop:
            return False
        text = self._decode(completion[-self._window :])
        return any(stop in text for stop in self.stop)

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
