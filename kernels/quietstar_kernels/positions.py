"""Integer positions that the host plans with and the device reads: each copied, and checked, once.

A training step hands the same anchors to every layer. A copy between host and device waits, so the copies of a tensor
are kept beside it for as long as it lives and is not written to.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_KEPT: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Positions:
    """Copies of one integer tensor.

    Args:
        tensor: positions, int32 or int64, on any device.

    Attributes:
        host: the same positions, int64 on the CPU.
        checked: conditions that `host` has been found to satisfy, filled by the caller.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.host = tensor.detach().to("cpu", torch.int64, copy=True)
        self.checked: set[object] = set()
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """int32 and contiguous on `device`."""
        if device not in self._copies:
            # waits until it has arrived: the next reader may be on another stream, or a graph that is captured
            self._copies[device] = self.host.to(torch.int32).contiguous().to(device)
        return self._copies[device]


def positions_of(tensor: Tensor) -> Positions:
    """The copies of a tensor, made at its first use and after every write to it.

    In inference mode nothing counts writes, and nothing is kept.
    """
    if tensor.is_inference():
        return Positions(tensor)
    kept: tuple[int, Positions] | None = _KEPT.get(tensor)
    if kept is None or kept[0] != tensor._version:
        kept = (tensor._version, Positions(tensor))
        _KEPT[tensor] = kept
    return kept[1]
