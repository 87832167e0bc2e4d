"""Scores of the steps of a solution, and where its steps end in tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.data.examples import Example, encode_example
from quietstar.errors import DataError


def encode_steps(
    tokenizer: PreTrainedTokenizerBase, prompt: str, steps: Sequence[str], name: str = "solution"
) -> tuple[Example, list[int]]:
    """A solution as an example, and where its steps end in it.

    Args:
        tokenizer: With an end-of-sequence token.
        prompt: What they follow.
        steps: Joined, they are the solution.
        name: What it is called in messages.

    Returns:
        The example, and for each step how many of the completion's tokens lie before its end. A token that reaches
        into the next step belongs to that; the end-of-sequence token belongs to the last.

    Raises:
        DataError: There is no step.
    """
    if not steps:
        raise DataError(f"{name}: steps: got none, needs at least one")
    whole = encode_example(tokenizer, prompt, "".join(steps), name)
    own = whole.tokens[whole.prompt_length :]
    ends: list[int] = []
    for count in range(1, len(steps)):
        begun = encode_example(tokenizer, prompt, "".join(steps[:count]))
        tokens = begun.tokens[begun.prompt_length : -1]
        same = next((n for n, (a, b) in enumerate(zip(tokens, own, strict=False)) if a != b), len(tokens))
        ends.append(max(same, ends[-1] if ends else 0))
    return whole, [*ends, len(own)]


def step_scores(
    tokens: Tensor, ends: Sequence[int], *, probabilities: bool = False, beta: float | None = None
) -> list[float]:
    """A score between 0 and 1 for each step; what they mean stands at `Verifier.score_steps`.

    Args:
        tokens: [completion tokens]: log-probabilities in nats, or their log-ratios to a reference's, or probabilities
            that the completion is right.
        ends: Of `encode_steps`.
        probabilities: They are these.
        beta: Where they are log-ratios: that of the DPO loss.
    """
    if beta is not None:
        until = torch.nn.functional.pad(tokens.cumsum(0), (1, 0))
        return [float(torch.sigmoid(beta * until[end])) for end in ends]
    scores: list[float] = []
    for start, end in zip([0, *ends], ends, strict=False):
        if start == end:
            scores.append(scores[-1] if scores else 0.5 if probabilities else 1.0)
        else:
            score = float(tokens[end - 1] if probabilities else tokens[start:end].mean().exp())
            scores.append(min(1.0, max(0.0, score)))  # a head that was trained with orm_loss mse may leave 0..1
    return scores
