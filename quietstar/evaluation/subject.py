"""What every measure works with: the model that is evaluated, its settings and records, and the texts that it
writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.errors import DataError
from quietstar.evaluation.answers import AnswerFormat
from quietstar.evaluation.item_store import ItemStore, Record, key_of
from quietstar.evaluation.settings import UNBOUNDED, Settings
from quietstar.evaluation.token_texts import Texts
from quietstar.inference.completing import continue_texts, pad_left
from quietstar.inference.prompts import CompletionOptions
from quietstar.model.cache import ThinkingRecord
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.tasks.task import Problem

Item = TypeVar("Item")

FORMAT = 1
"""Version of generated texts, part of their records' keys: raise it with any change after which other texts are
written. Answers are read from the texts again each time, so that a change of how they are read needs no new texts."""


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated, with everything that its measures need.

    Args:
        writer: Writer with the model and its tokenizer.
        texts: Text of each token of the tokenizer.
        store: Store of the records of items.
        settings: Settings of the evaluation.
        model_key: Hash of the model from `fingerprint`.
    """

    writer: Writer
    texts: Texts
    store: ItemStore
    settings: Settings
    model_key: str

    @property
    def context(self) -> int:
        """Number of tokens that a text may have, from `context_of`."""
        return context_of(self.writer.model)

    def key(self, metric: str, *parts: object) -> str:
        """Returns the key of a record: a hash of what it is made from."""
        return key_of(self.model_key, metric, *parts)


def context_of(model: QuietStarForCausalLM) -> int:
    """Returns the number of tokens that a text may have, so that there is room for a thought after its last one."""
    length: int = getattr(model.config.text_config, "max_position_embeddings", None) or UNBOUNDED
    return length - model.config.thought_length - 2


def think_of(settings: Settings, thinking: bool) -> str:
    """Returns the value of `think` for one side."""
    return settings.think if thinking else "never"


def effort(*parts: Continuation) -> Record:
    """Returns fields of a record: tokens, thoughts and seconds of all its continuations together."""
    return {
        "tokens": sum(part.tokens for part in parts),
        "thought_at": sum(part.thought_at for part in parts),
        "seconds": sum(part.seconds for part in parts),
    }


def seconds_of(rows: Sequence[Record]) -> float:
    """Returns the total time of the records in seconds."""
    return sum(float(row["seconds"]) for row in rows)


def generated_by(rows: Sequence[Record]) -> dict[str, float]:
    """Returns `Comparison.generated` for the records of one side."""
    tokens, thought_at = (sum(int(row[name]) for row in rows) for name in ("tokens", "thought_at"))
    record = ThinkingRecord(tokens, thought_at, seconds_of(rows))
    return {"tokens": tokens, "tokens_per_second": record.tokens_per_second, "thought_at": record.share}


def in_order(problems: Sequence[Problem], found: dict[str, Record], form: AnswerFormat) -> list[Record]:
    """Returns the records of those problems that have one.

    Raises:
        DataError: No problem has a record.
    """
    rows = [found[problem.id] for problem in problems if problem.id in found]
    if not rows:
        raise DataError(none_fits(form))
    return rows


def none_fits(form: AnswerFormat) -> str:
    """Returns the error message for the case that every problem is too long."""
    return f"{form.task.name}: no problem fits into the model's context; needs a smaller --max_new_tokens"


@dataclass(frozen=True)
class Continuation:
    """A text that the model has written.

    Args:
        text: New text, without the prompt and the end-of-sequence token.
        tokens: Number of generated tokens.
        thought_at: Number of these tokens that the model thought at.
        seconds: Share of the batch's wall time, in seconds.
    """

    text: str
    tokens: int
    thought_at: int
    seconds: float


@dataclass(frozen=True)
class Writer:
    """A model that continues prompts.

    Args:
        model: Thinking model in evaluation mode.
        tokenizer: Tokenizer of the model.
        think: Argument `think` of `generate` for the side that thinks.
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
    ) -> list[Continuation]:
        """Continues prompts, padded on the left.

        Args:
            prompts: Token ids of each prompt.
            thinking: Whether the model thinks; else the base model writes alone.
            max_new_tokens: Largest number of new tokens.
            is_complete: Function that says whether a text needs no more tokens.
            temperature: Sampling temperature, with `seeds`, over all tokens; 0 takes the most probable token.
            seeds: Seed of the text and the thoughts for each prompt; None for 0.
        """
        options = CompletionOptions(max_new_tokens, self.think if thinking else "never", temperature=temperature)
        record = ThinkingRecord()
        seeds = [0] * len(prompts) if seeds is None else seeds
        rows = continue_texts(self.model, self.tokenizer, prompts, options, seeds, record, is_complete=is_complete)
        each = record.seconds / len(prompts)
        return [
            Continuation(row.text, len(row.tokens), sum(own is not None for own in row.thoughts), each) for row in rows
        ]


def pad_right(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Returns token ids as int64 [B, L] and their attention mask, 0 in the padding on the right."""
    ids, mask = pad_left([row[::-1] for row in rows])
    return ids.flip(1), mask.flip(1)


def batches(items: Sequence[Item], size: int, length: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Yields items of similar length together, the longest first: a batch that needs too much memory fails at once."""
    ordered = sorted(items, key=length, reverse=True)
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]
