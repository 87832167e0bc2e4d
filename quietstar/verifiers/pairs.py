"""Pairs of a right and a wrong completion of one problem, and the rows that they are trained in.

The log-probabilities of completions follow: differentiable ones of training rows, then those of many examples for
scoring.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.data.batches import Batch, permutation
from quietstar.data.examples import Example, encode_example, pack_examples
from quietstar.errors import DataError
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.training.step import text_targets
from quietstar.training.step_functions import token_nll


@dataclass(frozen=True)
class Labelled:
    """A completion with the result of its check.

    Args:
        problem: Name of the problem.
        prompt: Prompt of the completion, without a hint.
        completion: Text that the model wrote, without the end-of-sequence token.
        correct: Whether the check found the completion right.
    """

    problem: str
    prompt: str
    completion: str
    correct: bool


@dataclass(frozen=True)
class Pair:
    """A right and a wrong completion of one prompt.

    Args:
        problem: Name of the problem.
        prompt: Prompt of both completions.
        right: Right completion, to be preferred.
        wrong: Wrong completion of the same prompt.
    """

    problem: str
    prompt: str
    right: str
    wrong: str


def distinct(completions: Iterable[Labelled]) -> list[Labelled]:
    """Returns the completions without later copies of one text of a problem, in the given order."""
    return list({(one.problem, one.prompt, one.completion): one for one in reversed(list(completions))}.values())[::-1]


def make_pairs(completions: Iterable[Labelled], per_problem: int, seed: int) -> list[Pair]:
    """Draws pairs for each problem, without replacement, from all combinations of a right and a wrong completion.

    The pairs of a problem depend on its own completions and the seed alone.

    Args:
        completions: Checked completions of any number of problems; equal texts of a problem count once.
        per_problem: Largest number of pairs per problem, at least 1.
        seed: Seed of the random draw.

    Returns:
        Pairs in the order in which their problems first occur.

    Raises:
        DataError: No problem has both a right and a wrong completion.
    """
    problems: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
    for one in distinct(completions):
        right, wrong = problems.setdefault((one.problem, one.prompt), ([], []))
        (right if one.correct else wrong).append(one.completion)
    pairs = []
    for (problem, prompt), (right, wrong) in problems.items():
        key = int.from_bytes(hashlib.sha256(problem.encode()).digest()[:8])
        for place in permutation(len(right) * len(wrong), seed, key)[:per_problem].tolist():
            first, second = divmod(place, len(wrong))
            pairs.append(Pair(problem, prompt, right[first], wrong[second]))
    if not pairs:
        all_right = sum(not wrong for _, wrong in problems.values())
        raise DataError(
            f"pairs: no problem has both a right and a wrong completion ({len(problems)} problems: {all_right} with "
            f"right ones alone, {len(problems) - all_right} with wrong ones alone). Sample more completions of each "
            "problem (sampling.samples) or at a higher sampling.temperature; add harder problems where all are right, "
            "easier ones or few-shot examples where all are wrong"
        )
    return pairs


@dataclass(frozen=True)
class Rows:
    """Rows of whole examples that do not see each other; an optimizer step takes a row as one text.

    Args:
        tokens: Token ids, int64 [n, L].
        attention_mask: Numbers of the examples within a row, 1, 2, ..., int64 [n, L]; 0 for the padding on the right.
        loss_mask: Mask of the completions' tokens, bool [n, L].
        labels: One label for each example of a row, float32 [n, D]; None: the examples have no labels.
    """

    tokens: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def sha256(self) -> str:
        """Returns the hash of all tokens, masks and labels."""
        digest = hashlib.sha256(repr(list(self.tokens.shape)).encode())
        labels = [] if self.labels is None else [self.labels]
        for tensor in (self.tokens, self.attention_mask, self.loss_mask, *labels):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def rows_of(groups: Sequence[Sequence[Example]]) -> Rows:
    """Packs each group of examples into one row; all rows have the length of the longest group.

    Args:
        groups: Groups of examples, at least one group and no empty one.
    """
    length = max(sum(map(len, group)) for group in groups)
    packed = [pack_examples(group, length) for group in groups]
    return Rows(
        torch.cat([row.tokens for row in packed]),
        torch.cat([row.attention_mask for row in packed]),
        torch.cat([row.loss_mask for row in packed]),
    )


def encode_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> list[list[Example]]:
    """Encodes the two examples of each pair, the right one first.

    Raises:
        ConfigError: The tokenizer has no end-of-sequence token.
        DataError: A prompt has no tokens.
    """
    return [
        [encode_example(tokenizer, pair.prompt, text, f"problem {pair.problem}") for text in (pair.right, pair.wrong)]
        for pair in pairs
    ]


def completion_logprobs(model: QuietStarForCausalLM, batch: Batch, documents: int = 2) -> tuple[Tensor, Tensor]:
    """Returns the log-probability of each document's completion, summed over its tokens, and the number of tokens.

    Args:
        model: Model to score with; its `base` is used.
        batch: Rows with an attention mask that numbers their documents, and a loss mask.
        documents: Number of documents per row, D; documents of a row after the D-th are left out.

    Returns:
        Sums [B, D] in nats, float32 (float64 for a float64 model) and differentiable, and counts, int64 [B, D]; both 0
        for a document that a row does not have.
    """
    return per_document(-token_nll(model, batch), batch, documents)


def per_document(values: Tensor, batch: Batch, documents: int) -> tuple[Tensor, Tensor]:
    """Sums values over the predicted tokens of each document, and counts these tokens.

    Args:
        values: One number for each next token, [B, L-1].
        batch: Rows with an attention mask that numbers their documents, and a loss mask.
        documents: Number of documents per row, D.

    Returns:
        Sums [B, D] of the values' type, and counts, int64 [B, D].
    """
    mask = cast(Tensor, batch.attention_mask)
    chosen = text_targets(batch)
    own = [(mask[:, 1:] == document) & chosen for document in range(1, documents + 1)]
    # masked sums instead of a scatter, whose order of additions is not fixed on a GPU
    return torch.stack([(values * here).sum(1) for here in own], 1), torch.stack([here.sum(1) for here in own], 1)


def trimmed(batch: Batch) -> Batch:
    """Returns the batch without the columns in which every row has padding."""
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
    """Log-probabilities of the completions of n examples.

    Args:
        logprob: Log-probability of each completion, float64 [n], in nats, summed over its tokens including the
            end-of-sequence token.
        tokens: Number of those tokens, int64 [n].
    """

    logprob: Tensor
    tokens: Tensor

    @property
    def mean(self) -> Tensor:
        """Log-probability per token, float64 [n], in nats."""
        return self.logprob / self.tokens


def score_examples(
    model: QuietStarForCausalLM, examples: Sequence[Example], row_length: int | None = None, batch_rows: int = 8
) -> Scores:
    """Returns the log-probabilities of many completions, without gradient.

    Except for rounding, they do not depend on which examples are scored together.

    Args:
        model: Model to score with; its `base` is used.
        examples: Examples to score, at least one.
        row_length: Number of tokens per row, which as many examples as fit share; None: the length of the longest
            example.
        batch_rows: Number of rows per forward pass.

    Raises:
        DataError: `examples` is empty, or an example is longer than a row or than the model's context.
    """
    tokens = token_logprobs(model, examples, row_length, batch_rows)
    return Scores(torch.stack([own.sum() for own in tokens]), torch.tensor([len(own) for own in tokens]))


def token_logprobs(
    model: QuietStarForCausalLM, examples: Sequence[Example], row_length: int | None = None, batch_rows: int = 8
) -> list[Tensor]:
    """Returns the log-probability of each completion token, in nats: float64 [tokens of its completion], on the CPU,
    for each example.

    Takes the arguments of `score_examples` and raises the same errors.
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
    """Measures every completion token: returns float64 [tokens of its completion], on the CPU, for each example.

    Args:
        model: Model that `measure` uses; put into evaluation mode meanwhile.
        measure: Function from a batch to one number for each token, [B, L].
        examples, row_length, batch_rows: Examples to measure, tokens per row and rows per pass, as for
            `score_examples`.
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
    """Refuses examples that are longer than the model's context.

    Raises:
        DataError: An example is too long; the message names it, its number of tokens and the model's context.
    """
    limit = getattr(model.base.config, "max_position_embeddings", None)
    for index, example in enumerate(examples):
        if limit is not None and len(example) > limit:
            raise DataError(
                f"{example.name or f'example {index}'}: prompt and completion have {len(example)} tokens, but the "
                f"model's context has {limit}; leave it out, or use fewer few-shot examples"
            )
