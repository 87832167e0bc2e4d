"""Prompts with completions: how they become tokens, and rows that hold several, each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.data.tokenizer import encode_prompt
from quietstar.errors import ConfigError, DataError


@dataclass(frozen=True)
class Example:
    """A prompt and its completion.

    Args:
        tokens: Ids of both, the end-of-sequence token included.
        prompt_length: How many of them are the prompt, at least one. The others are what is learned or scored.
        name: For messages.
    """

    tokens: tuple[int, ...]
    prompt_length: int
    name: str = ""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class PackedExamples:
    """Rows of whole examples, none of which sees another.

    Args:
        tokens: int64 [n, length].
        attention_mask: int64 [n, length], 0 where there is padding, else 1, 2, ...: the example within its row.
        loss_mask: bool [n, length], True at the tokens of completions.
        order: The examples' indices, row by row.
    """

    tokens: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    order: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return self.tokens.shape[0]


def encode_example(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, name: str = "") -> Example:
    """A prompt and a completion that ends in the end-of-sequence token.

    The two are encoded together, so that a completion is what the model would have written: alone, many tokenizers
    would begin it with a space of their own. Where a token would reach across the border they are encoded apart.

    Args:
        tokenizer: With an end-of-sequence token.
        prompt: Not empty.
        completion: What follows.
        name: For messages.

    Raises:
        ConfigError: The tokenizer has no end-of-sequence token.
        DataError: The prompt has no tokens.
    """
    end = end_of_sequence(tokenizer)
    start = encode_prompt(tokenizer, prompt)
    if not start:
        raise DataError(f"{name or 'example'}: the prompt has no tokens")
    together = encode_prompt(tokenizer, prompt + completion)
    prefixed = together[: len(start)] == start
    rest = together[len(start) :] if prefixed else _continued(tokenizer, completion)
    return Example((*start, *rest, end), len(start), name)


def _continued(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that follows another: behind a line break, where no tokenizer adds a space to it."""
    before, both, alone = (
        list(tokenizer(given, add_special_tokens=False)["input_ids"]) for given in ("\n", f"\n{text}", text)
    )
    return both[len(before) :] if both[: len(before)] == before else alone


def end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends a completion.

    Raises:
        ConfigError: There is none.
    """
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ConfigError("model.path: the tokenizer has no end-of-sequence token, which ends a completion; set one")
    return eos


def pack_examples(examples: Sequence[Example], length: int, padding: int = 0) -> PackedExamples:
    """Puts examples into rows in their order, a new row where one does not fit.

    Args:
        examples: At least one.
        length: Tokens per row.
        padding: Token that fills a row up.

    Raises:
        DataError: There is none, or one is longer than a row.
    """
    if not examples:
        raise DataError("examples: got none, needs at least one")
    rows: list[list[int]] = []
    room = 0
    for index, example in enumerate(examples):
        if len(example) > length:
            raise DataError(f"{example.name or f'example {index}'}: {len(example)} tokens, but a row has {length}")
        if len(example) > room:
            rows.append([])
            room = length
        rows[-1].append(index)
        room -= len(example)
    tokens = torch.full((len(rows), length), padding, dtype=torch.int64)
    attention_mask = torch.zeros_like(tokens)
    loss_mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, indices in enumerate(rows):
        end = 0
        for document, index in enumerate(indices, start=1):
            example, start = examples[index], end
            end = start + len(example)
            tokens[row, start:end] = torch.tensor(example.tokens)
            attention_mask[row, start:end] = document
            loss_mask[row, start + example.prompt_length : end] = True
    return PackedExamples(tokens, attention_mask, loss_mask, tuple(map(tuple, rows)))
