"""The inputs of STaR and V-STaR that are read before a model is loaded, and the runs that a comparison consists of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from quietstar.config.loops import OuterLoopConfig, fine_tuning_steps
from quietstar.config.options import check_weights_format
from quietstar.data.tokenizer import check_tokenizer
from quietstar.errors import ConfigError
from quietstar.tasks.registry import load_task
from quietstar.tasks.task import Split, Task

SPLITS: tuple[Split, ...] = ("train", "test")


def load_problems(config: OuterLoopConfig, with_verifier: bool) -> Task:
    """Returns the task of a run after reading its problems. Nothing here needs torch.

    Args:
        config: Validated configuration of the run.
        with_verifier: Whether a verifier is trained, as in V-STaR.

    Raises:
        ConfigError, DataError: The problems, an option or the path of the model cannot be used.
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
        check_weights_format(config.model.path)
    return task


@dataclass(frozen=True)
class ComparedRun:
    """One of several runs that are compared.

    Args:
        config: Configuration of the run.
        with_verifier: Whether the run trains a verifier, as in V-STaR.
    """

    config: OuterLoopConfig
    with_verifier: bool = False


def at_budget(config: OuterLoopConfig, budget: int) -> OuterLoopConfig:
    """Returns the run with `budget` completions per training problem over all iterations, like V-STaR's baselines.

    Greedy loops are returned unchanged: a second greedy completion equals the first. The page counts the completions
    that each run has sampled.

    Raises:
        ConfigError: The budget is less than one completion per iteration.
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
    """Returns the embedded default of STaR and its controls, by name.

    The controls are the same loop without rationalisation, and fine-tuning on answers without rationales for as many
    steps as the last iteration takes.

    Args:
        config: Configuration with the base model that all runs start from.
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
