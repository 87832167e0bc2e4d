"""What `python -m quietstar.star` and `python -m quietstar.vstar` share."""

from __future__ import annotations

import time
from pathlib import Path

from quietstar.config.loops import EMBEDDED, OuterLoopConfig
from quietstar.config.values import set_up
from quietstar.outer_loop.inputs import load_problems, star_arms
from quietstar.reporting.loop_report import print_table


def run(config: OuterLoopConfig, with_verifier: bool) -> None:
    """A run with its table and page; of STaR's embedded default its controls too.

    Args:
        config: A validated configuration.
        with_verifier: V-STaR.
    """
    started = time.monotonic()
    load_problems(config, with_verifier)
    set_up(config.training.threads)  # torch comes here, after all that can be refused before
    if config.dry_run:
        from quietstar.outer_loop.run import describe

        describe(config)
        return
    from quietstar.outer_loop.comparison import run_arms, shared_base
    from quietstar.outer_loop.run import run_outer_loop

    if config.preset in EMBEDDED and config.controls and not with_verifier:
        run_arms(star_arms(shared_base(config)), Path(config.output_dir))
    else:
        print_table(run_outer_loop(config, with_verifier))
    print(f"report: {Path(config.output_dir) / 'report.html'}")
    print(f"This command took {time.monotonic() - started:.0f} s.")
