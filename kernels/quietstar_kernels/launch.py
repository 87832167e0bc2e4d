"""A kernel call as a value: run now, or compiled ahead of time by whoever wants to look at the result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One call of a Triton kernel.

    Args:
        kernel: `@triton.jit` function to launch.
        grid: number of programs along each axis.
        arguments: run-time arguments by name: tensors, ints, floats, None.
        constants: `tl.constexpr` arguments by name.
        num_warps: number of warps of a program.
        num_stages: number of stages of the software pipeline.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    @property
    def options(self) -> dict[str, Any]:
        """What Triton's compiler is told besides the arguments."""
        # Fused multiply-add is asked for by name: Triton's default for it is announced to change (its pull request
        # 11270), and rounding and registers with it.
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Start the kernel on the current stream of the device that its tensors are on."""
        if not all(self.grid):
            return
        tensor = next(value for value in self.arguments.values() if isinstance(value, torch.Tensor))
        with torch.cuda.device_of(tensor):  # Triton starts kernels on the current device, wherever the tensors are
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)
