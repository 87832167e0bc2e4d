"""Log-probabilities of completions: differentiable ones of training rows, and those of many examples for scoring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from quietstar.data.batches import Batch
from quietstar.data.examples import Example, pack_examples
from quietstar.errors import DataError
from quietstar.model import QuietStarForCausalLM
from quietstar.training.measures import text_targets
from quietstar.training.methods import token_nll


def completion_logprobs(model: QuietStarForCausalLM, batch: Batch, documents: int = 2) -> tuple[Tensor, Tensor]:
    """Log-probability of each document's completion, summed over its tokens, and how many these are.

    Args:
        model: The model whose `base` is asked.
        batch: Rows with an attention mask that numbers their documents, and a loss mask.
        documents: D; documents of a row after the D-th are left out.

    Returns:
        Sums [B, D] in nats, float32 (float64 for a float64 model) and differentiable, and counts, int64 [B, D]; both 0
        for a document that a row does not have.
    """
    return per_document(-token_nll(model, batch), batch, documents)


def per_document(values: Tensor, batch: Batch, documents: int) -> tuple[Tensor, Tensor]:
    """Sums of what belongs to the predicted tokens of each document, and their counts.

    Args:
        values: [B, L-1], one for each next token.
        batch: As in `completion_logprobs`.
        documents: D.

    Returns:
        Sums [B, D] of the values' type, and counts, int64 [B, D].
    """
    mask = cast(Tensor, batch.attention_mask)
    chosen = text_targets(batch)
    own = [(mask[:, 1:] == document) & chosen for document in range(1, documents + 1)]
    # masked sums and no scatter: its order of additions is not fixed on a GPU
    return torch.stack([(values * here).sum(1) for here in own], 1), torch.stack([here.sum(1) for here in own], 1)


def trimmed(batch: Batch) -> Batch:
    """The batch without the columns in which every row has padding."""
    mask = cast(Tensor, batch.attention_mask)
    length = int(mask.any(0).sum())
    return replace(
        batch,
        tokens=batch.tokens[:, :length],
        attention_mask=mask[:, :length],
        loss_mask=None if batch.loss_mask is None else batch.loss_mask[:, :length],
    )


@dataclass(frozen=True)
class Scores:
    """What the completions of n examples are worth to a model.

    Args:
        logprob: float64 [n], nats, summed over the completion's tokens, the end-of-sequence token included.
        tokens: int64 [n], how many these are.
    """

    logprob: Tensor
    tokens: Tensor

    @property
    def mean(self) -> Tensor:
        """float64 [n], nats per token."""
        return self.logprob / self.tokens


def score_examples(
    model: QuietStarForCausalLM, examples: Sequence[Example], row_length: int | None = None, batch_rows: int = 8
) -> Scores:
    """Log-probabilities of many completions, without gradient.

    They do not depend on which examples are scored together, but for the rounding of their sums.

    Args:
        model: The model whose `base` is asked.
        examples: At least one.
        row_length: Tokens per row, into which as many examples go as fit; by default those of the longest example.
        batch_rows: Rows at once.

    Raises:
        DataError: There is no example, or one is longer than a row or than the model's context.
    """
    tokens = token_logprobs(model, examples, row_length, batch_rows)
    return Scores(torch.stack([own.sum() for own in tokens]), torch.tensor([len(own) for own in tokens]))


def token_logprobs(
    model: QuietStarForCausalLM, examples: Sequence[Example], row_length: int | None = None, batch_rows: int = 8
) -> list[Tensor]:
    """Log-probability of each completion token, by example: float64 [tokens of its completion] on the CPU.

    Args and errors are those of `score_examples`.
    """

    def logprobs(batch: Batch) -> Tensor:
        return torch.nn.functional.pad(-token_nll(model, batch), (1, 0))

    return of_completions(model, logprobs, examples, row_length, batch_rows)


@torch.no_grad()
def of_completions(
    model: QuietStarForCausalLM,
    measure: Callable[[Batch], Tensor],
    examples: Sequence[Example],
    row_length: int | None,
    batch_rows: int,
) -> list[Tensor]:
    """What is measured at each completion token, by example: float64 [tokens of its completion] on the CPU.

    Args:
        model: What measures; in evaluation mode meanwhile.
        measure: Batch -> [B, L], one number for each token.
        examples, row_length, batch_rows: As in `score_examples`.
    """
    require_context(model, examples)
    longest = max(map(len, examples), default=0)
    packed = pack_examples(examples, longest if row_length is None else row_length)
    device, was_training = next(model.parameters()).device, model.training
    found: dict[int, Tensor] = {}
    model.train(False)
    try:
        for first in range(0, len(packed), batch_rows):
            rows = slice(first, first + batch_rows)
            masks = (packed.attention_mask[rows], packed.loss_mask[rows])
            batch = trimmed(Batch(packed.tokens[rows], masks[0], (), loss_mask=masks[1])).to(device)
            values = measure(batch).double().cpu()
            for row, indices in enumerate(packed.order[rows]):
                end = 0
                for index in indices:
                    start, end = end, end + len(examples[index])
                    found[index] = values[row, start + examples[index].prompt_length : end].clone()
    finally:
        model.train(was_training)
    return [found[index] for index in range(len(examples))]


def require_context(model: QuietStarForCausalLM, examples: Sequence[Example]) -> None:
    """Refuses examples that the model has no positions for.

    Raises:
        DataError: Naming the example, its tokens and the model's context.
    """
    limit = getattr(model.base.config, "max_position_embeddings", None)
    for index, example in enumerate(examples):
        if limit is not None and len(example) > limit:
            raise DataError(
                f"{example.name or f'example {index}'}: prompt and completion have {len(example)} tokens, but the "
                f"model's context has {limit}; leave it out, or use fewer few-shot examples"
            )
