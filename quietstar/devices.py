"""Where computations run. Importing this imports no torch."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from quietstar.errors import ConfigError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Of weights, as commands offer them."""


def check_device(name: str, option: str = "training.device") -> None:
    """Whether a device could have that name, on whatever machine.

    Args:
        name: `auto`, `cpu`, `cuda` or `cuda:N`.
        option: For the message.

    Raises:
        ConfigError: It is none of these.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ConfigError(f"{option}: got {name!r}, needs auto, cpu, cuda or cuda:N")


def resolve_device(name: str, option: str = "training.device") -> torch.device:
    """The device that an option names.

    Args:
        name: `auto` (the first GPU, or the CPU where there is none), `cpu`, `cuda` or `cuda:N`.
        option: For the message.

    Raises:
        ConfigError: There is no such device.
    """
    import torch  # not at the top: commands read `DTYPES` and check names before it is needed

    check_device(name, option)
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
