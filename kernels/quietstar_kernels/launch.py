"""A kernel call as a value: run now, or compiled ahead of time by whoever wants to look at the result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from quietstar_kernels.configurations import Configuration


@dataclass(frozen=True)
class Launch:
    """One call of a Triton kernel.

    Args:
        kernel: `@triton.jit` function to launch.
        grid: number of programs along each axis.
        arguments: run-time arguments by name: tensors, ints, floats, None.
        configuration: line of the pinned table, whose block sizes are `tl.constexpr` arguments too.
        constants: the other `tl.constexpr` arguments by name.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    configuration: Configuration
    constants: dict[str, Any] = field(default_factory=dict)

    @property
    def keywords(self) -> dict[str, Any]:
        """Every `tl.constexpr` argument, and what Triton's compiler is told besides the arguments."""
        # Fused multiply-add is asked for by name: Triton's default for it is announced to change (its pull request
        # 11270), and rounding and registers with it.
        return {**self.constants, **self.configuration, "enable_fp_fusion": True}

    def run(self) -> None:
        """Start the kernel on the current stream of the device that its tensors are on."""
        if not all(self.grid):
            return
        tensor = next(value for value in self.arguments.values() if isinstance(value, torch.Tensor))
        with torch.cuda.device_of(tensor):  # Triton starts kernels on the current device, wherever the tensors are
            self.kernel[self.grid](**self.arguments, **self.keywords)
