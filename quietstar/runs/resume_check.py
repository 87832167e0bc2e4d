"""Whether a checkpoint belongs to the run that wants to continue from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from quietstar.config.training import TrainingOptions
from quietstar.runs.files import changed_options

# A change of any other option in the middle of a run would give a run of neither the old nor the new options.
# `steps` may change, so that a run can be extended: the schedule then follows the new number.
MAY_CHANGE = frozenset(
    {"steps", "micro_batch_size", "reuse_sampling_pass", "eval_every", "eval_batches", "save_every", "keep_checkpoints"}
    | {"keep_best", "on_save_failure", "on_non_finite", "max_non_finite", "on_out_of_memory", "log_every", "log_to"}
    | {"report", "device", "threads", "deterministic", "resume", "override", "allow_partial"}
)


def identity(
    options: TrainingOptions, run_options: Mapping[str, Any] | None, data: Mapping[str, Any], has_extra_state: bool
) -> dict[str, Any]:
    """Returns what identifies a run in its checkpoints, as plain JSON values.

    Args:
        options: Options of the training loop.
        run_options: Other options that decide what is trained, by dotted key; None where the run does not name them.
        data: Fingerprint of the training data.
        has_extra_state: Whether something besides the model learns.
    """
    return {
        "options": asdict(options),
        "run_options": None if run_options is None else dict(run_options),
        "data": dict(data),
        "has_extra_state": has_extra_state,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns a phrase for each difference between the `identity` of two runs that makes them different runs."""
    changed = changed_options(_fixed(before["options"]), _fixed(now["options"]))
    if (before["run_options"] is None) != (now["run_options"] is None):
        changed.append("one says what its model and objective are and the other does not")
    else:
        changed += changed_options(before["run_options"] or {}, now["run_options"] or {})
    data = {f"the training data's {key}": value for key, value in before["data"].items()}
    changed += changed_options(data, {f"the training data's {key}": value for key, value in now["data"].items()})
    if before["has_extra_state"] != now["has_extra_state"]:
        changed.append("one has extra state and the other has not")
    return changed


def _fixed(options: Mapping[str, Any]) -> dict[str, Any]:
    return {f"training.{name}": value for name, value in options.items() if name not in MAY_CHANGE}
