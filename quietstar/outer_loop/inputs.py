"""What a run of STaR or V-STaR reads before it loads a model."""

from __future__ import annotations

from quietstar.data.tokenizer import check_tokenizer
from quietstar.errors import ConfigError
from quietstar.outer_loop.config import OuterLoopConfig
from quietstar.tasks.registry import load_task
from quietstar.tasks.task import Split, Task

SPLITS: tuple[Split, ...] = ("train", "test")


def load_problems(config: OuterLoopConfig, with_verifier: bool) -> Task:
    """The task of a run, whose problems have been read. Nothing of this needs torch.

    Args:
        config: A validated configuration.
        with_verifier: V-STaR.

    Raises:
        ConfigError, DataError: For what is wrong with the problems, an option, or the path of the model.
    """
    task = load_task(config.task, config.problems)
    for split in SPLITS:
        task.problems(split)
    if with_verifier and config.loop.few_shot_in_training:
        raise ConfigError(
            "loop.few_shot_in_training: a verifier reads the problem alone, and would start from a generator that has "
            "learned to see solved examples first; turn it off"
        )
    if config.model.path is not None:
        check_tokenizer(config.model.path)
    return task
