"""Prompts with completions: encodes them as tokens, and packs several into a row where none sees another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.data.tokenizer import continued, encode_prompt
from quietstar.errors import ConfigError, DataError


@dataclass(frozen=True)
class Example:
    """A prompt and its completion as tokens.

    Args:
        tokens: Token ids of the prompt and the completion, the end-of-sequence token included.
        prompt_length: Number of tokens of the prompt, at least one. The tokens after it are learned or scored.
        name: Name of the example in error messages.
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
        tokens: Token ids, int64 [n, length].
        attention_mask: Number of each token's example within the row, 1, 2, ..., and 0 at padding; int64 [n, length].
        loss_mask: Mask of the tokens of completions, bool [n, length].
        order: Indices of the examples in each row, row by row.
    """

    tokens: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    order: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return self.tokens.shape[0]


def encode_example(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, name: str = "") -> Example:
    """Encodes a prompt and its completion, and puts the end-of-sequence token after them.

    The two are encoded together, so that the completion has the tokens that the model would have written: many
    tokenizers put a space before a text that is encoded alone. Where a token would reach across the border they are
    encoded apart.

    Args:
        tokenizer: Tokenizer of the model, with an end-of-sequence token.
        prompt: Text that the completion follows; not empty.
        completion: Text that follows the prompt.
        name: Name of the example in error messages.

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
    rest = together[len(start) :] if prefixed else continued(tokenizer, completion)
    return Example((*start, *rest, end), len(start), name)


def end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id of the token that ends a completion.

    Raises:
        ConfigError: The tokenizer has no such token.
    """
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ConfigError("model.path: the tokenizer has no end-of-sequence token, which ends a completion; set one")
    return eos


def pack_examples(examples: Sequence[Example], length: int, padding: int = 0) -> PackedExamples:
    """Puts examples into rows in their order; an example that does not fit begins a new row.

    Args:
        examples: Encoded examples, at least one.
        length: Number of tokens in each row.
        padding: Id of the token that fills up a row.

    Raises:
        DataError: There is no example, or one is longer than a row.
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
