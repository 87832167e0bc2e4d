"""The learning rate of a training run: a pure function of the step, so that no checkpoint needs to hold its state."""

from __future__ import annotations

import math
from dataclasses import replace

from quietstar.config.training import TrainingOptions


def learning_rate(step: int, options: TrainingOptions) -> float:
    """Returns the learning rate of optimizer step `step`, before the multipliers of the parameter groups.

    It rises linearly and reaches the peak at step `warmup_steps`; then it stays (`constant`) or falls (`linear`,
    `cosine`) and reaches `final_learning_rate_fraction` of the peak exactly at step `steps`.

    Args:
        step: Optimizer step, counted from 1.
        options: Training options; `learning_rate`, `warmup_steps`, `steps`, `schedule` and
            `final_learning_rate_fraction` are used.

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


def schedule_change(before: object, options: TrainingOptions, done: int) -> str:
    """Returns a sentence that says so where a resumed run is not the run of its new length; else an empty text.

    Args:
        before: Number of steps that the run was to have until now.
        options: Training options from now on.
        done: Number of optimizer steps done.
    """
    if not isinstance(before, int) or before == options.steps:
        return ""
    old = replace(options, steps=before)
    if all(learning_rate(step, old) == learning_rate(step, options) for step in range(1, done + 1)):
        return ""
    return (
        f"training.steps was {before} and is {options.steps}: under training.schedule {options.schedule} the {done} "
        f"steps done had another learning rate than in a run of {options.steps} steps, so the two runs differ; "
        "training.schedule constant does not depend on training.steps"
    )
