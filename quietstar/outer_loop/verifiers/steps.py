"""Scores of the steps of a solution: where its steps end in tokens, and one number out of a score for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from quietstar.data.examples import Example, encode_example
from quietstar.errors import ConfigError, DataError

Process = Literal["product", "minimum", "last"]


def process_score(scores: Sequence[float], how: Process = "product") -> float:
    """One number for a solution from the scores of its steps (Lightman et al., arXiv 2305.20050, App. F).

    Args:
        scores: One for each step, at least one.
        how: `product` (all steps are right, where scores are probabilities), `minimum` (the weakest step), or `last`.

    Raises:
        DataError: There is no step.
        ConfigError: `how` is something else.
    """
    if not scores:
        raise DataError("steps: got none, needs at least one")
    if how == "product":
        return math.prod(scores)
    if how == "minimum":
        return min(scores)
    if how == "last":
        return scores[-1]
    raise ConfigError(f"how: got {how!r}, needs product, minimum or last")


def encode_steps(tokenizer: PreTrainedTokenizerBase, prompt: str, steps: Sequence[str]) -> tuple[Example, list[int]]:
    """A solution as an example, and where its steps end in it.

    Args:
        tokenizer: With an end-of-sequence token.
        prompt: What they follow.
        steps: Joined, they are the solution.

    Returns:
        The example, and for each step how many of the completion's tokens lie before its end. A token that reaches
        into the next step belongs to that; the end-of-sequence token belongs to the last.

    Raises:
        DataError: There is no step.
    """
    if not steps:
        raise DataError("steps: got none, needs at least one")
    whole = encode_example(tokenizer, prompt, "".join(steps), "solution")
    own = whole.tokens[whole.prompt_length :]
    ends: list[int] = []
    for count in range(1, len(steps)):
        begun = encode_example(tokenizer, prompt, "".join(steps[:count]))
        tokens = begun.tokens[begun.prompt_length : -1]
        same = next((n for n, (a, b) in enumerate(zip(tokens, own, strict=False)) if a != b), len(tokens))
        ends.append(max(same, ends[-1] if ends else 0))
    return whole, [*ends, len(own)]
