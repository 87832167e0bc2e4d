"""How long each iteration fine-tunes."""

from __future__ import annotations

import math

from quietstar.outer_loop.options import LoopOptions


def fine_tuning_steps(iteration: int, options: LoopOptions, rows: int, batch_size: int) -> int:
    """Optimizer steps of an iteration (STaR, appendix H).

    Args:
        iteration: From 1.
        options: `schedule` and its numbers are used.
        rows: Rows of training data, used by `epochs` alone.
        batch_size: Rows per step.

    Returns:
        At least 1. The exponential schedule gives 40, 48, 57, ..., and 7,912 at the 30th iteration.
    """
    if options.schedule == "exponential":
        steps = int(options.start_steps * options.growth ** (iteration - 1))
    elif options.schedule == "linear":
        steps = options.start_steps + options.added_steps * (iteration - 1)
    else:
        epochs = options.start_epochs + options.added_epochs * (iteration - 1)
        steps = math.ceil(rows * epochs / batch_size)
    return max(1, steps)
