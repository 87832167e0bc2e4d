"""The learning rate of a step, as a pure function of it: nothing to save, nothing to get out of step on resume."""

from __future__ import annotations

import math

from quietstar.config import TrainingOptions


def learning_rate(step: int, options: TrainingOptions) -> float:
    """Learning rate that optimizer step `step` uses, before the multipliers of the parameter groups.

    It rises linearly and reaches the peak at step `warmup_steps`; then it stays (`constant`) or falls (`linear`,
    `cosine`) and reaches `final_learning_rate_fraction` of the peak exactly at step `steps`.

    Args:
        step: Optimizer step, counted from 1.
        options: `learning_rate`, `warmup_steps`, `steps`, `schedule` and `final_learning_rate_fraction` are used.

    Returns:
        The learning rate, at least 0.
    """
    peak, final = options.learning_rate, options.final_learning_rate_fraction
    if step < options.warmup_steps:
        return peak * max(step, 0) / options.warmup_steps
    if options.schedule == "constant":
        return peak
    progress = min(1.0, (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps))
    remaining = 1.0 - progress if options.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (final + (1.0 - final) * remaining)
