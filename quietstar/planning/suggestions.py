"""What to change so that a run fits, each suggestion tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from quietstar.config import TrainConfig, validate
from quietstar.errors import ConfigError

Changes = dict[str, Any]
Peak = Callable[[TrainConfig], int]
"""Bytes at the peak of a run."""


@dataclass(frozen=True)
class Suggestion:
    """Changes with which a run fits.

    Args:
        changes: Options by dotted key.
        total: Bytes at the peak with them.
    """

    changes: Changes
    total: int

    def __str__(self) -> str:
        return " ".join(f"--{key} {_text(value)}" for key, value in self.changes.items())


def suggest(config: TrainConfig, limit: int, peak: Peak) -> list[Suggestion]:
    """Single changes with which a run fits; if there is none, one after another of them until it does.

    Args:
        config: A run that does not fit.
        limit: Bytes that there are.
        peak: Says what a run takes.

    Returns:
        Nothing if not even all changes together make it fit.
    """
    found = [Suggestion(changes, total) for changes, total in _micro_batches(config, {}, limit, peak)]
    for changes in _single_changes(config):
        total = _peak(config, changes, peak)
        if total is not None and total <= limit:
            found.append(Suggestion(changes, total))
    if found:
        return found
    together: Changes = {"training.micro_batch_size": 1}
    for changes in _single_changes(config):
        if _peak(config, together | changes, peak) is not None:
            together |= changes
            total = _peak(config, together, peak)
            if total is not None and total <= limit:
                larger = _micro_batches(config, together, limit, peak)
                return [Suggestion(more, bytes_) for more, bytes_ in larger] or [Suggestion(together, total)]
    return []


def with_changes(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """The configuration with other values of some options.

    Raises:
        ConfigError: They do not go together.
    """
    for key, value in changes.items():
        group, _, name = key.partition(".")
        config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
    return validate(config, require_inputs=False)


def _single_changes(config: TrainConfig) -> Iterator[Changes]:
    """From what changes the result least to what changes it most."""
    training, finetuning, model = config.training, config.finetuning, config.model
    thinks = training.method == "quietstar"
    if model.dtype == "float32":
        yield {"model.dtype": "bfloat16"}
    if thinks and not training.reuse_sampling_pass:
        yield {"training.reuse_sampling_pass": True}
    if not thinks and not finetuning.gradient_checkpointing:
        yield {"finetuning.gradient_checkpointing": True}
    if training.optimizer == "adamw":
        yield {"training.optimizer": "adamw_8bit"}
    if thinks and model.thoughts_per_position > 2:
        yield {"model.thoughts_per_position": 2}
    if thinks and model.positions == "all":
        yield {"model.positions": "entropy:0.25"}
    if not finetuning.lora_rank and not finetuning.freeze.strip():
        yield {"finetuning.lora_rank": 16}
    if config.data.length // 2 >= model.thought_length + model.lookahead:
        yield {"data.length": config.data.length // 2}


def _micro_batches(config: TrainConfig, changes: Changes, limit: int, peak: Peak) -> list[tuple[Changes, int]]:
    """The largest micro-batch that fits with other changes, if one does; without any, a smaller one than now."""
    batch = config.training.batch_size
    now = config.training.micro_batch_size or batch
    sizes = [size for size in range(1, now + bool(changes)) if batch % size == 0]
    best: list[tuple[Changes, int]] = []
    while sizes:  # more texts take more memory
        middle = len(sizes) // 2 if best else 0  # often not even the smallest fits
        tried = changes | {"training.micro_batch_size": sizes[middle]}
        total = _peak(config, tried, peak)
        if total is not None and total <= limit:
            best, sizes = [(tried, total)], sizes[middle + 1 :]
        else:
            sizes = sizes[:middle]
    return best


def _peak(config: TrainConfig, changes: Changes, peak: Peak) -> int | None:
    try:
        return peak(with_changes(config, changes))
    except ConfigError:  # two options that exclude each other
        return None


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
