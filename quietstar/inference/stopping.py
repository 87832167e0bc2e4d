"""Ending a text as soon as it is complete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class WhenComplete(StoppingCriteria):
    """Ends a row with the token that makes its new text complete; transformers' own, for stop strings alone, needs a
    tokenizer that can read any letter.

    Args:
        tokenizer: The model's.
        prompt_length: Columns in front of the new tokens.
        is_complete: Whether a text needs no more.
        tail: How many of the last tokens it has to see; None: all.
    """

    def __init__(
        self, tokenizer: Any, prompt_length: int, is_complete: Callable[[str], bool], tail: int | None = None
    ) -> None:
        self._tokenizer, self._prompt_length = tokenizer, prompt_length
        self._is_complete, self._tail = is_complete, tail
        self._ends: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Any:
        """Which rows are at their end, bool [B]."""
        rows = input_ids[:, self._prompt_length :].tolist()
        for row, tokens in enumerate(rows):
            if row not in self._ends and self._is_complete(self._decode(tokens)):
                self._ends[row] = len(tokens)
        return torch.tensor([row in self._ends for row in range(len(rows))], device=input_ids.device)

    def end(self, row: int) -> int | None:
        """How many new tokens a row had when it was complete; None: it never was."""
        return self._ends.get(row)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens if self._tail is None else tokens[-self._tail :])
        return text


def stop_strings(tokenizer: Any, prompt_length: int, strings: Sequence[str]) -> WhenComplete:
    """Ends a row with the token that completes one of some strings."""
    # a token is a byte at least; a few more, as some tokenizers drop a space before the first that they decode
    tail = max(len(string.encode()) for string in strings) + 4
    return WhenComplete(tokenizer, prompt_length, lambda text: any(string in text for string in strings), tail)
