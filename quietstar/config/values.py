"""What the values of some options mean: devices, paths of models, positions that think; torch-free until asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from quietstar.config.options import DEVICE, Bound
from quietstar.errors import ConfigError

if TYPE_CHECKING:
    import torch


def resolve_device(name: str, option: str = "training.device") -> torch.device:
    """The device that an option names.

    Args:
        name: `auto` (the first GPU, or the CPU where there is none), `cpu`, `cuda` or `cuda:N`.
        option: For the message.

    Raises:
        ConfigError: There is no such device.
    """
    import torch  # not at the top: commands check names before it is needed

    DEVICE.hold(option, name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = name.partition(":")[2]
    if int(index or 0) >= count:
        raise ConfigError(f"{option}: got {name}, but PyTorch sees {count} CUDA devices here")
    return torch.device("cuda", int(index) if index else torch.cuda.current_device())


def set_up(threads: int | None) -> None:
    """Readies a process for a command that trains.

    Args:
        threads: Of PyTorch, on the CPU; None leaves its choice.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading and saving; a training has its own
    if threads is not None:
        torch.set_num_threads(threads)


def check_model_path(path: str | os.PathLike[str], option: str = "model.path") -> None:
    """Whether there could be a model at a path; a hub is not asked.

    Args:
        path: What should be a directory or a hub name.
        option: For the message.

    Raises:
        ConfigError: It is no directory and cannot be a hub name.
    """
    name = os.fspath(path)
    local = name.startswith((".", "~", os.sep)) or name.count("/") > 1
    if not Path(name).is_dir() and (local or Path(name).exists()):
        raise ConfigError(f"{option}: {name} is not a directory; a model is a directory or a hub name")


def parse_positions(positions: str, name: str = "positions") -> tuple[str, float]:
    """Read `all`, `every:N` or `entropy:K`.

    Args:
        positions: What to read. A count is written with digits alone: 1.0 could be a count or all of the text.
        name: What the message calls it.

    Returns:
        The rule, and its number: N, a count K as a whole number or a fraction K below 1; 1 for `all`.

    Raises:
        ConfigError: Anything else.
    """
    POSITIONS.hold(name, positions)
    rule, _, number = positions.partition(":")
    return rule, float(number or 1)


def _are_positions(positions: str) -> bool:
    rule, _, number = positions.partition(":")
    try:
        value = float(number)
    except ValueError:
        return positions == "all"
    return (number.isdecimal() and value >= 1 and rule in ("every", "entropy")) or (rule == "entropy" and 0 < value < 1)


POSITIONS = Bound(
    "all, every:N (N at least 1), or entropy:K (K a count of at least 1, or a fraction between 0 and 1)", _are_positions
)
Positions = Annotated[str, POSITIONS]
