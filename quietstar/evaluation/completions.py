"""Texts that a model writes after prompts, with and without thinking."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from quietstar.evaluation.token_texts import decode
from quietstar.model import QuietStarForCausalLM

Item = TypeVar("Item")


@dataclass(frozen=True)
class Completion:
    """What was written.

    Args:
        text: Without the prompt and the end-of-sequence token.
        tokens: How many were generated.
        seconds: This one's share of its batch's time.
    """

    text: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Writer:
    """A model that continues prompts.

    Args:
        model: In evaluation mode.
        tokenizer: Its own.
        think: As in `generate`, on the side that thinks.
    """

    model: QuietStarForCausalLM
    tokenizer: PreTrainedTokenizerBase
    think: str

    def write(
        self,
        prompts: Sequence[list[int]],
        thinking: bool,
        max_new_tokens: int,
        is_complete: Callable[[str], bool],
        temperature: float | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Continues prompts, padded on the left.

        Args:
            prompts: Token ids of each.
            thinking: Or the base model alone.
            max_new_tokens: At most.
            is_complete: Whether a text needs no more.
            temperature: Sample, with `seeds`; None: the most probable tokens.
            seeds: Of the text and the thoughts, one for each prompt.
        """
        start = time.perf_counter()
        device = self.model.head.weight.device
        ids, mask = pad_left(prompts)
        length = ids.shape[1]
        end = self.tokenizer.eos_token_id
        done = _Complete(self.tokenizer, length, is_complete)
        options: dict[str, Any] = {"do_sample": False}
        if temperature is not None:  # the whole distribution, whatever the checkpoint's generation_config says
            options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "seed": seeds}
        generated: Any = self.model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            think=self.think if thinking else "never",
            max_new_tokens=max_new_tokens,
            pad_token_id=0 if end is None else end,
            stopping_criteria=StoppingCriteriaList([done]),
            **options,
        )
        found = []
        seconds = (time.perf_counter() - start) / len(prompts)
        for row, stop in zip(generated[:, length:].tolist(), done.lengths(generated), strict=True):
            kept = row[:stop]
            if end in kept:
                kept = kept[: kept.index(end)]
            found.append(Completion(decode(self.tokenizer, kept), len(kept), seconds))
        return found


class _Complete(StoppingCriteria):
    """Ends each row as soon as its text is complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int, is_complete: Callable[[str], bool]) -> None:
        self._tokenizer, self._length, self._is_complete = tokenizer, length, is_complete
        self._ended: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        written = input_ids[:, self._length :].tolist()
        for row, tokens in enumerate(written):
            if row not in self._ended and self._is_complete(decode(self._tokenizer, tokens)):
                self._ended[row] = len(tokens)
        return torch.tensor([row in self._ended for row in range(len(written))], device=input_ids.device)

    def lengths(self, generated: Tensor) -> list[int]:
        """Tokens of each row up to where it was complete."""
        most = generated.shape[1] - self._length
        return [self._ended.get(row, most) for row in range(len(generated))]


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids as int64 [B, L] and their attention mask, 0 in the padding on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def pad_right(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The same with the padding on the right."""
    ids, mask = pad_left([row[::-1] for row in rows])
    return ids.flip(1), mask.flip(1)


def batches(items: Sequence[Item], size: int, length: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Items of similar length together, the longest first: what runs out of memory does so at once."""
    ordered = sorted(items, key=length, reverse=True)
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]
