"""Several runs that are compared: each in a directory of its own, and one page about all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from quietstar.errors import ConfigError
from quietstar.files import make_output_dir
from quietstar.outer_loop.config import OuterLoopConfig
from quietstar.outer_loop.make_base import make_base
from quietstar.outer_loop.phases import Phases
from quietstar.outer_loop.report import print_comparison, write_comparison
from quietstar.outer_loop.run import run_outer_loop, tell
from quietstar.outer_loop.schedule import fine_tuning_steps
from quietstar.tasks.registry import load_task
from quietstar.training.events import EventLog
from quietstar.training.run_lock import RunLock


@dataclass(frozen=True)
class Arm:
    """One of several runs that are compared.

    Args:
        config: Its options.
        with_verifier: Whether it trains a verifier.
    """

    config: OuterLoopConfig
    with_verifier: bool = False


def run_arms(arms: Mapping[str, Arm], out: Path, budget: int | None = None) -> None:
    """Runs each arm in its own directory, and writes `report.html` and `comparison.json`. What is finished is kept.

    Args:
        arms: By name.
        out: Directory of the comparison.
        budget: Completions of each training problem to compare at; null: the most that all have.
    """
    make_output_dir(out)
    with RunLock(out):
        for name, arm in arms.items():
            tell(f"== {name}")
            run_outer_loop(arm.config, arm.with_verifier)
        directories = {name: Path(arm.config.output_dir) for name, arm in arms.items()}
        write_comparison(out, directories, budget)
        print_comparison(directories, budget)


def shared_base(config: OuterLoopConfig) -> OuterLoopConfig:
    """Makes the base model of an embedded default, and names it: what several arms start from."""
    out = Path(config.output_dir)
    make_output_dir(out)
    with RunLock(out):
        phases = Phases(out, EventLog(out), config.loop.redo, tell)
        base = make_base(config, load_task(config.task, config.problems), phases)
    return replace(config, preset="plain", model=replace(config.model, path=base))


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


def star_arms(config: OuterLoopConfig) -> dict[str, Arm]:
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
    return {name: Arm(replace(arm, output_dir=str(out / name.replace(" ", "-")))) for name, arm in arms.items()}
