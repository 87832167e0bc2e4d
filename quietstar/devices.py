"""Where computations run."""

from __future__ import annotations

import torch

from quietstar.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Of weights, as commands offer them."""


def resolve_device(name: str, option: str = "training.device") -> torch.device:
    """The device that an option names.

    Args:
        name: `auto` (the first GPU, or the CPU where there is none), `cpu`, `cuda` or `cuda:N`.
        option: For the message.

    Raises:
        ConfigError: There is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise ConfigError(f"{option}: got {name!r}, needs auto, cpu, cuda or cuda:N")
    if int(index or 0) >= count:
        raise ConfigError(f"{option}: got {name}, but PyTorch sees {count} CUDA devices here")
    return torch.device("cuda", int(index) if index else torch.cuda.current_device())
