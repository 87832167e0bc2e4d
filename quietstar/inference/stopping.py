"""Strings that end a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class StopStrings(StoppingCriteria):
    """Ends a row with the token that completes one of some strings; transformers' own needs a tokenizer that can read
    any letter.

    Args:
        tokenizer: The model's.
        strings: Not empty.
        prompt_length: Columns in front of the new tokens.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str], prompt_length: int) -> None:
        self._tokenizer = tokenizer
        self._strings = strings
        self._prompt_length = prompt_length
        # a token is a byte at least; a few more, as some tokenizers drop a space before the first that they decode
        self._tail = max((len(string.encode()) for string in strings), default=0) + 4

    def end(self, tokens: Sequence[int]) -> bool:
        """Whether one of the strings is in the last of a row's new tokens."""
        text = self._tokenizer.decode(tokens[-self._tail :]) if self._strings else ""
        return any(string in text for string in self._strings)

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Any:
        """Which rows are at their end, bool [B]."""
        new = input_ids[:, self._prompt_length :].tolist()
        return torch.tensor([self.end(tokens) for tokens in new], device=input_ids.device)
