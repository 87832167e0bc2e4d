"""What is asked of a sampler and what comes back, whichever engine does it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

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
class Generation:
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

    def sample(self, requests: Sequence[Request]) -> list[Generation]:
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
