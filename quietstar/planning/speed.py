"""How long a step would take on a GPU: each operation as long as its arithmetic, its memory or its start takes."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from quietstar.planning.gpus import Gpu
from quietstar.planning.ledger import Work
from quietstar.planning.trace import Trace

PRODUCTS, BANDWIDTH, START = 0.6, 0.75, 5e-6
"""Assumed: share of the GPU's arithmetic that products reach, share of its bandwidth, seconds an operation takes at
least."""
ASSUMPTIONS = (
    f"matrix products at {PRODUCTS:.0%} of the GPU's peak, memory at {BANDWIDTH:.0%} of its bandwidth, "
    f"{START * 1e6:.0f} us an operation at least"
)
LOW_PRECISION = (torch.bfloat16, torch.float16)


def part_seconds(trace: Trace, gpu: Gpu) -> dict[str, float]:
    """Expected seconds of each part of a step."""
    return {part: _seconds(work.items(), gpu) for part, work in trace.work.items()}


def _seconds(work: Iterable[tuple[Work, float]], gpu: Gpu) -> float:
    total = 0.0
    for one, times in work:
        tflops = gpu.bf16_tflops if one.dtype in LOW_PRECISION else gpu.float32_tflops
        arithmetic = one.flops / (tflops * 1e12 * PRODUCTS)
        total += times * max(arithmetic, one.bytes / (gpu.bandwidth * BANDWIDTH), START)
    return total
