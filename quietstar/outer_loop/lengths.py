"""Whether all prompts and completions fit, asked before anything is sampled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from quietstar.data.encoding import encode_prompt
from quietstar.errors import ConfigError
from quietstar.outer_loop.config import OuterLoopConfig
from quietstar.outer_loop.sampling.requests import Request, check_lengths
from quietstar.tasks.task import Problem, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 64
"""Of many prompts so many with the most characters are encoded: one of them has the most tokens, or nearly so. Whatever
is sampled is checked again, exactly."""


def check_problems(
    config: OuterLoopConfig,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    train: Sequence[Problem],
    test: Sequence[Problem],
) -> None:
    """Refuses a run that would stop at a long problem later.

    Args:
        config: Of the run.
        task: Of the problems.
        tokenizer: Of the model.
        context: Tokens that the model can read; None: it has no limit.
        train, test: The problems.

    Raises:
        DataError: A prompt does not fit into the model's context.
        ConfigError: A training example may not fit into a row.
    """
    new = config.sampling.max_new_tokens
    for hint in (False, True) if config.loop.rationalize else (False,):
        before = task.few_shot(hint) if config.sampling.few_shot else ""
        asked = [*train] if hint else [*train, *test]
        prompts = {problem.id: before + task.prompt(problem, hint) for problem in asked}
        requests = [Request(prompt, 0, f"problem {name}") for name, prompt in _longest(prompts.items())]
        check_lengths(requests, [encode_prompt(tokenizer, one.prompt) for one in requests], new, context)
    before = task.few_shot() if config.loop.few_shot_in_training and config.sampling.few_shot else ""
    for name, prompt in _longest((problem.id, before + task.prompt(problem)) for problem in train):
        needed = len(encode_prompt(tokenizer, prompt)) + new + 1
        if needed > config.loop.row_length:
            raise ConfigError(
                f"loop.row_length: got {config.loop.row_length}, but problem {name} with a completion of "
                f"sampling.max_new_tokens {new} may have {needed} tokens; raise it, or lower that"
            )


def _longest(prompts: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted(prompts, key=lambda item: -len(item[1]))[:LONGEST]
