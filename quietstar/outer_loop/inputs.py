"""What a run of STaR or V-STaR reads before it loads a model.

Which runs a comparison is made of.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from quietstar.config.loops import OuterLoopConfig, fine_tuning_steps
from quietstar.data.tokenizer import check_tokenizer
from quietstar.errors import ConfigError
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


@dataclass(frozen=True)
class ComparedRun:
    """One of several runs that are compared.

    Args:
        config: Its options.
        with_verifier: Whether it trains a verifier.
    """

    config: OuterLoopConfig
    with_verifier: bool = False


def at_budget(config: OuterLoopConfig, budget: int) -> OuterLoopConfig:
    """The same run with `budget` completions of each training problem in all of its iterations, as V-STaR's baselines.

    Greedy loops stay as they are: a second greedy completion is the first. The page counts what each has sampled.

    Raises:
        ConfigError: It is less than one completion in each iteration.
    """
    iterations = config.loop.iterations
    if config.sampling.temperature == 0 or iterations == 0:
        return config
    if budget < iterations:
        raise ConfigError(
            f"budget: got {budget}, but preset {config.preset} has {iterations} iterations; needs as many"
        )
    return replace(config, sampling=replace(config.sampling, samples=budget // iterations))


def star_with_controls(config: OuterLoopConfig) -> dict[str, ComparedRun]:
    """The embedded default of STaR and its controls: no rationalisation; and answers without rationales, fine-tuned on
    for as many steps as the last iteration takes.

    Args:
        config: With the base model that all start from.
    """
    last = fine_tuning_steps(max(1, config.loop.iterations), config.loop, 1, 1)
    direct = replace(config.loop, iterations=0, supervised_start=True, supervised_steps=last, rationalize=False)
    arms = {
        "with rationalisation": config,
        "without rationalisation": replace(config, loop=replace(config.loop, rationalize=False)),
        "answers alone": replace(config, task=f"{config.task}-direct", loop=direct),
    }
    out = Path(config.output_dir)
    return {name: ComparedRun(replace(arm, output_dir=str(out / name.replace(" ", "-")))) for name, arm in arms.items()}
