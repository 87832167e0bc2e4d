"""What the evaluation of a task works with: the model, its settings, what is known already, and the problems.

Texts that a model writes after prompts, with and without thinking.
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
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.model.thinking_cache import ThinkingRecord
from quietstar.tasks.task import Problem

FORMAT = 1
"""Of generated texts, part of their records' keys: to be raised with any change after which others are written. Answers
are read out of the texts again each time, so that a change of how that is done needs no new texts."""


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Args:
        writer: The model with its tokenizer.
        texts: What each token spells.
        store: Of records.
        settings: Of the evaluation.
        model_key: `fingerprint` of the model.
    """

    writer: Writer
    texts: Texts
    store: ItemStore
    settings: Settings
    model_key: str

    @property
    def context(self) -> int:
        """As `context_of` the model."""
        return context_of(self.writer.model)

    def key(self, metric: str, *parts: object) -> str:
        """A record's name: what it was made from."""
        return key_of(self.model_key, metric, *parts)


def context_of(model: QuietStarForCausalLM) -> int:
    """Tokens that a text may have, so that the thought after its last one still has a place."""
    length: int = getattr(model.config.text_config, "max_position_embeddings", None) or UNBOUNDED
    return length - model.config.thought_length - 2


def think_of(settings: Settings, thinking: bool) -> str:
    """`think` of one side."""
    return settings.think if thinking else "never"


def effort(*parts: Continuation) -> Record:
    """Fields of a record: what its completions took together."""
    return {
        "tokens": sum(part.tokens for part in parts),
        "thought_at": sum(part.thought_at for part in parts),
        "seconds": sum(part.seconds for part in parts),
    }


def seconds_of(rows: Sequence[Record]) -> float:
    """Time that the records took."""
    return sum(float(row["seconds"]) for row in rows)


def generated_by(rows: Sequence[Record]) -> dict[str, float]:
    """`Comparison.generated` of the records of one side."""
    tokens, thought_at = (sum(int(row[name]) for row in rows) for name in ("tokens", "thought_at"))
    record = ThinkingRecord(tokens, thought_at, seconds_of(rows))
    return {"tokens": tokens, "tokens_per_second": record.tokens_per_second, "thought_at": record.share}


def in_order(problems: Sequence[Problem], found: dict[str, Record], form: AnswerFormat) -> list[Record]:
    """The records of those problems that have one.

    Raises:
        DataError: None has.
    """
    rows = [found[problem.id] for problem in problems if problem.id in found]
    if not rows:
        raise DataError(none_fits(form))
    return rows


def none_fits(form: AnswerFormat) -> str:
    """The message where every problem is too long."""
    return f"{form.task.name}: no problem fits into the model's context; needs a smaller --max_new_tokens"


Item = TypeVar("Item")


@dataclass(frozen=True)
class Continuation:
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
    ) -> list[Continuation]:
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
            Continuation(row.text, len(row.tokens), sum(own is not None for own in row.thoughts), each) for row in rows
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
