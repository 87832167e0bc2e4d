"""Runs several outer loops to compare them: each in its own directory, and one report on all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from quietstar.config.loops import OuterLoopConfig
from quietstar.outer_loop.finetune import make_base
from quietstar.outer_loop.inputs import Arm
from quietstar.outer_loop.phases import Phases
from quietstar.outer_loop.run import run_outer_loop, tell
from quietstar.reporting.comparison_report import print_comparison, write_comparison
from quietstar.runs.files import EventLog, RunLock, make_output_dir
from quietstar.tasks.registry import load_task


def run_arms(arms: Mapping[str, Arm], out: Path, budget: int | None = None) -> None:
    """Runs each arm in its own directory, and writes `report.html` and `comparison.json`; finished work is kept.

    Args:
        arms: Outer loops to compare, by name.
        out: Directory of the comparison.
        budget: Completions of each training problem to compare at; None for the largest number that all arms have.
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
    """Makes the base model of an embedded default, and returns options with which several arms start from it."""
    out = Path(config.output_dir)
    make_output_dir(out)
    with RunLock(out):
        phases = Phases(out, EventLog(out), config.loop.redo, tell)
        base = make_base(config, load_task(config.task, config.problems), phases)
    return replace(config, preset="plain", model=replace(config.model, path=base))
