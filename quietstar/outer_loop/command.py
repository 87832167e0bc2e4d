"""What `python -m quietstar.star` and `python -m quietstar.vstar` share."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import transformers

from quietstar.outer_loop.comparison import run_arms, shared_base, star_arms
from quietstar.outer_loop.config import EMBEDDED, OuterLoopConfig
from quietstar.outer_loop.dry_run import describe
from quietstar.outer_loop.report import print_table
from quietstar.outer_loop.run import run_outer_loop


def run(config: OuterLoopConfig, with_verifier: bool) -> None:
    """A run with its table and page; of STaR's embedded default its controls too.

    Args:
        config: A validated configuration.
        with_verifier: V-STaR.
    """
    transformers.utils.logging.disable_progress_bar()  # of loading and saving; a run has its own
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    started = time.monotonic()
    if config.dry_run:
        describe(config)
        return
    if config.preset in EMBEDDED and config.controls and not with_verifier:
        run_arms(star_arms(shared_base(config)), Path(config.output_dir))
    else:
        print_table(run_outer_loop(config, with_verifier))
    print(f"report: {Path(config.output_dir) / 'report.html'}")
    print(f"This command took {time.monotonic() - started:.0f} s.")
