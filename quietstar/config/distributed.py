"""The options of a run on several devices, which torchrun starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from quietstar.config.options import Count
from quietstar.errors import ConfigError


@dataclass
class DistributedOptions:
    """Several devices: `torchrun --standalone --nproc_per_node=8 -m quietstar.train ...` shards the model over them.

    Args:
        shard: Number of ranks that one copy of the model is sharded over, which divides the number of ranks; the copies
            train together (HSDP). Fewer ranks exchange less, and hold more each. Null: all ranks, one copy.
        keep_gathered: Whether each layer's weights stay gathered from the first pass of a step to its backward pass.
            Each rank then holds all layers in the type they are computed in, and receives them once a step instead of
            model.thought_length + 4 times.
    """

    shard: Count | None = None
    keep_gathered: bool = False


def world() -> tuple[int, int]:
    """Returns the number of this process and of all processes, as torchrun says them; (0, 1) without it.

    Raises:
        ConfigError: The environment has only a part of what torchrun sets.
    """
    try:
        size = int(os.environ.get("WORLD_SIZE", 1))
        rank = int(os.environ["RANK"]) if size > 1 else 0
    except (KeyError, ValueError):
        raise ConfigError(
            "the environment has WORLD_SIZE, but not what torchrun sets besides; unset it, or start with torchrun"
        ) from None
    return rank, size


def check_alone(command: str) -> None:
    """Refuses a command that has nothing to share among the processes of torchrun.

    Raises:
        ConfigError: There are several processes.
    """
    _, size = world()
    if size > 1:
        raise ConfigError(
            f"{command}: torchrun has started {size} processes; only train runs on several, start it alone"
        )


def check_distributed(options: DistributedOptions, training: Any, preset: str) -> None:
    """Refuses what cannot be done on the processes that torchrun has started.

    Args:
        options: Options of the run on several devices.
        training: Object with the fields `batch_size`, `device`, `fused_layers`, `optimizer` and `replay`.
        preset: Name of the preset.

    Raises:
        ConfigError: naming the dotted key, the value, and what is needed.
    """
    _, ranks = world()
    if ranks == 1:
        return
    if options.shard is not None and ranks % options.shard:
        raise ConfigError(
            f"distributed.shard: got {options.shard}, which does not divide the {ranks} ranks of torchrun"
        )
    if training.batch_size % ranks:
        raise ConfigError(
            f"training.batch_size: got {training.batch_size}, which does not divide among the {ranks} ranks of torchrun"
        )
    if training.device.startswith("cuda:"):
        raise ConfigError(
            f"training.device: got {training.device}, but under torchrun each rank has a GPU of its own; needs cuda"
        )
    if training.replay == "auto":
        raise ConfigError("training.replay: got auto, which plans for one device; needs a stage on several ranks")
    if preset == "textbook":
        raise ConfigError("preset: textbook trains small models on one device; start it without torchrun")
    if training.fused_layers != "none":
        raise ConfigError(
            f"training.fused_layers: got {training.fused_layers}, which has not been tried on shards; needs none on "
            "several ranks"
        )
    if training.optimizer == "adamw_8bit":
        raise ConfigError(
            "training.optimizer: got adamw_8bit, whose moments are not sharded; needs adamw on several ranks"
        )
