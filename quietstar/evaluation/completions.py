"""Texts that a model writes after prompts, with and without thinking."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.inference.completing import continue_texts, pad_left
from quietstar.inference.completion_options import CompletionOptions
from quietstar.inference.record import ThinkingRecord
from quietstar.model import QuietStarForCausalLM

Item = TypeVar("Item")


@dataclass(frozen=True)
class Completion:
    """What was written.

    Args:
        text: Without the prompt and the end-of-sequence token.
        tokens: How many were generated.
        thought_at: At how many of them the model thought.
        seconds: This one's share of its batch's time.
    """

    text: str
    tokens: int
    thought_at: int
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
        temperature: float = 0.0,
        seeds: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Continues prompts, padded on the left.

        Args:
            prompts: Token ids of each.
            thinking: Or the base model alone.
            max_new_tokens: At most.
            is_complete: Whether a text needs no more.
            temperature: Sample, with `seeds`, from all tokens; 0: the most probable ones.
            seeds: Of the text and the thoughts, one for each prompt.
        """
        options = CompletionOptions(max_new_tokens, self.think if thinking else "never", temperature=temperature)
        record = ThinkingRecord()
        seeds = [0] * len(prompts) if seeds is None else seeds
        rows = continue_texts(self.model, self.tokenizer, prompts, options, seeds, record, is_complete=is_complete)
        each = record.seconds / len(prompts)
        return [
            Completion(row.text, len(row.tokens), sum(own is not None for own in row.thoughts), each) for row in rows
        ]


def pad_right(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The same with the padding on the right."""
    ids, mask = pad_left([row[::-1] for row in rows])
    return ids.flip(1), mask.flip(1)


def batches(items: Sequence[Item], size: int, length: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Items of similar length together, the longest first: what runs out of memory does so at once."""
    ordered = sorted(items, key=length, reverse=True)
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]
