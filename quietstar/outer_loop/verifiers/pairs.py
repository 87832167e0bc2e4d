"""Pairs of a right and a wrong completion of one problem, and the rows that they are trained in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.data.examples import Example, encode_example, pack_examples
from quietstar.data.order import permutation
from quietstar.errors import DataError


@dataclass(frozen=True)
class Labelled:
    """A completion that was checked.

    Args:
        problem: Name of the problem.
        prompt: What the model was asked, without a hint.
        completion: What it wrote, without the end-of-sequence token.
        correct: What the check found.
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
        prompt: Of both.
        right: The completion to be preferred.
        wrong: The other.
    """

    problem: str
    prompt: str
    right: str
    wrong: str


def distinct(completions: Iterable[Labelled]) -> list[Labelled]:
    """The first of each text of a problem, in their order."""
    return list({(one.problem, one.prompt, one.completion): one for one in reversed(list(completions))}.values())[::-1]


def make_pairs(completions: Iterable[Labelled], per_problem: int, seed: int) -> list[Pair]:
    """Pairs of different texts, drawn for each problem without replacement from all right x wrong ones.

    What is drawn of a problem depends on its own completions and the seed alone.

    Args:
        completions: Of any number of problems; equal texts count once.
        per_problem: Pairs of a problem at most, at least 1.
        seed: Of the draw.

    Returns:
        Pairs in the order in which their problems first occur.

    Raises:
        DataError: There is no pair.
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
    """Rows of whole examples, none of which sees another: what an optimizer step takes as one text.

    Args:
        tokens: int64 [n, L].
        attention_mask: int64 [n, L], 0 where there is padding on the right, else 1, 2, ...: the example within its row.
        loss_mask: bool [n, L], True at the tokens of completions.
        labels: float32 [n, D], one for each of a row's examples; None: they need none.
    """

    tokens: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def sha256(self) -> str:
        """Of all tokens, masks and labels."""
        digest = hashlib.sha256(repr(list(self.tokens.shape)).encode())
        labels = [] if self.labels is None else [self.labels]
        for tensor in (self.tokens, self.attention_mask, self.loss_mask, *labels):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def rows_of(groups: Sequence[Sequence[Example]]) -> Rows:
    """One row for each group of examples, as long as the longest needs.

    Args:
        groups: At least one, none of them empty.
    """
    length = max(sum(map(len, group)) for group in groups)
    packed = [pack_examples(group, length) for group in groups]
    return Rows(
        torch.cat([row.tokens for row in packed]),
        torch.cat([row.attention_mask for row in packed]),
        torch.cat([row.loss_mask for row in packed]),
    )


def encode_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> list[list[Example]]:
    """The two examples of each pair, the right one first.

    Raises:
        ConfigError: The tokenizer has no end-of-sequence token.
        DataError: A prompt has no tokens.
    """
    return [
        [encode_example(tokenizer, pair.prompt, text, f"problem {pair.problem}") for text in (pair.right, pair.wrong)]
        for pair in pairs
    ]
