"""What is asked of a sampler and what comes back, whichever engine does it.

Completions as text: what a decoder makes of the sampled tokens behind their prompt, and where a text ends.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from transformers import PreTrainedTokenizerBase

from quietstar.data.examples import end_of_sequence
from quietstar.errors import DataError


@dataclass(frozen=True)
class Request:
    """One completion of one prompt.

    Args:
        prompt: What is continued. It is never cut.
        seed: Of this completion's own random stream; see `sample_seed`.
        name: For messages.
    """

    prompt: str
    seed: int
    name: str


@dataclass(frozen=True)
class Completion:
    """A completion.

    Args:
        text: Without the end-of-sequence token, and without the stop string and what follows it.
        logprob: Nats: the sum over the sampled tokens, the ending one included, under the model itself (temperature 1,
            every token allowed).
        tokens: How many were sampled, the ending one included.
        finish_reason: `stop`: an end-of-sequence token or a stop string; `length`: neither within the tokens allowed.
    """

    text: str
    logprob: float
    tokens: int
    finish_reason: Literal["stop", "length"]


class Sampler(Protocol):
    """A model that completes prompts."""

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indices of requests that are sampled together: a pure function of the requests and the options.

        Raises:
            DataError: A prompt has no tokens, or is too long for the model's context.
        """
        ...

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions of one batch, in its order."""
        ...

    def close(self) -> None:
        """Frees the model; the sampler cannot be used any more."""
        ...


def sample_seed(seed: int, *parts: int | str | bool) -> int:
    """A seed below 2^63 of a sample's own, from the run's seed and what tells the sample from all others.

    Args:
        seed: Of the run.
        parts: Such as the iteration, the problem's id, the sample's index and whether the hint was shown.
    """
    key = json.dumps([seed, *parts], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def check_lengths(
    requests: Sequence[Request], prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int | None
) -> None:
    """Makes sure that each prompt and its completion fit into the model's context.

    Args:
        requests: For their names.
        prompts: Their token ids.
        max_new_tokens: Of a completion.
        context: Tokens that the model can read; None: it has no limit.

    Raises:
        DataError: One does not fit, or has no tokens.
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
    """Batches of prompts of similar length, so that there is little padding; equal prompts stand together."""
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), prompts[index], index))
    return [order[start : start + size] for start in range(0, len(order), size)]


TOKENS_PER_CHARACTER = 4
"""At most: the bytes of a character in UTF-8."""
SLACK = 8
"""Tokens in front of those that can hold a stop string, so that special tokens and lost first spaces do not matter."""


class CompletionText:
    """Decodes completions, without special tokens.

    Args:
        tokenizer: The model's.
        stop: Strings that end a completion.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(text for text in stop if text)
        longest = max(map(len, self.stop), default=0)
        self._window = TOKENS_PER_CHARACTER * longest + SLACK

    def decode(self, prompt: Sequence[int], completion: Sequence[int]) -> tuple[str, bool]:
        """The text of a completion up to its first stop string, and whether it has one.

        A text is what the completion adds to the prompt's: alone, many decoders would drop its first space.
        """
        before, both = self._decode(prompt), self._decode([*prompt, *completion])
        text = both[len(before) :] if both.startswith(before) else self._decode(completion)
        ends = [position for position in (text.find(stop) for stop in self.stop) if position >= 0]
        return (text[: min(ends)], True) if ends else (text, False)

    def has_stop(self, completion: Sequence[int]) -> bool:
        """Whether a completion, up to its newest token, has come to a stop string."""
        if not self.stop:
            return False
        text = self._decode(completion[-self._window :])
        return any(stop in text for stop in self.stop)

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def ending_tokens(tokenizer: PreTrainedTokenizerBase, generation_config: object) -> frozenset[int]:
    """Tokens that end a completion: end-of-sequence, and those of the model's generation config that are special.

    Many chat models end a turn with a token of their own. A generation config alone is not to be trusted: where the
    model's configuration names no such token it may hold a default that is an ordinary token of this tokenizer.

    Raises:
        ConfigError: The tokenizer has no end-of-sequence token.
    """
    named = getattr(generation_config, "eos_token_id", None)
    others = {named} if isinstance(named, int) else set(named or ())
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return frozenset({end_of_sequence(tokenizer), *(others & (special | set(tokenizer.all_special_ids)))})
