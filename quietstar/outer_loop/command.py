"""The commands `star`, `vstar` and `compare`; everything that can be refused without torch is refused first."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from quietstar.config.command_line import narrowed
from quietstar.config.commands import CompareConfig
from quietstar.config.loops import EMBEDDED, OuterLoopConfig
from quietstar.config.presets import STAR_PRESETS
from quietstar.errors import ConfigError
from quietstar.outer_loop.inputs import ComparedRun, at_budget, load_problems, star_with_controls
from quietstar.reporting.loop_report import print_table
from quietstar.runs.machine import set_up


def run_loop(config: OuterLoopConfig, with_verifier: bool) -> None:
    """Runs STaR or V-STaR, prints its table and writes its page; STaR's embedded default runs its controls too.

    Args:
        config: Validated configuration of the run.
        with_verifier: Whether a verifier is trained, as in V-STaR.
    """
    started = time.monotonic()
    load_problems(config, with_verifier)
    set_up(config.training)  # imports torch, after everything that can be refused without it
    if config.dry_run:
        from quietstar.outer_loop.run import describe

        describe(config)
        return
    from quietstar.outer_loop.run import run_compared, run_outer_loop, shared_base

    if config.preset in EMBEDDED and config.controls and not with_verifier:
        run_compared(star_with_controls(shared_base(config)), Path(config.output_dir))
    else:
        print_table(run_outer_loop(config, with_verifier))
    print(f"report: {Path(config.output_dir) / 'report.html'}")
    print(f"This command took {time.monotonic() - started:.0f} s.")


def compare(config: CompareConfig, of_presets: Mapping[str, CompareConfig]) -> None:
    """Runs each preset in its own directory, and writes one page that compares them.

    Args:
        config: Options of the comparison, with the directory that all runs share.
        of_presets: Options of each run, by name of its preset.

    Raises:
        ConfigError, DataError: An option, the problems or the path of the model cannot be used.
    """
    if len(of_presets) < len(config.presets) or not of_presets:
        raise ConfigError(f"presets: got {', '.join(config.presets) or 'none'}, needs at least one, and each once")
    out, arms = Path(config.output_dir), {}
    for name, own in of_presets.items():
        loop = replace(narrowed(OuterLoopConfig, own), output_dir=str(out / name))
        arms[name] = ComparedRun(
            loop if config.budget is None else at_budget(loop, config.budget), name not in STAR_PRESETS
        )
    for arm in arms.values():
        load_problems(arm.config, arm.with_verifier)
    if config.dry_run:
        from quietstar.outer_loop.run import describe

        for name, arm in arms.items():
            print(f"== {name}")
            describe(arm.config)
        return
    set_up(config.training)
    from quietstar.outer_loop.run import run_compared

    run_compared(arms, out, config.budget)
    print(f"report: {out / 'report.html'}")
