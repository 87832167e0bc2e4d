"""A plan: what a run's model is, what its steps take, and whether a device has that."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from quietstar.config import TrainConfig
from quietstar.planning.configurations import base_configuration
from quietstar.planning.extrapolate import trace_model
from quietstar.planning.gpus import GPUS, RESERVED, Gpu
from quietstar.planning.hollow import HollowTensors
from quietstar.planning.ledger import Ledger
from quietstar.planning.model import Parameters, count_parameters, hollow_model, import_libraries
from quietstar.planning.speed import ASSUMPTIONS, part_seconds
from quietstar.planning.suggestions import Suggestion, suggest
from quietstar.planning.trace import PARTS, Trace


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Args:
        config: The run.
        source: Where the model's configuration comes from.
        gpu: What it is planned for; None is this machine's CPU.
        memory: Bytes that there are.
        parameters: How many.
        trace: What a step takes.
        suggestions: With which changes it fits, where it does not.
    """

    config: TrainConfig
    source: str
    gpu: Gpu | None
    memory: int
    parameters: Parameters
    trace: Trace
    suggestions: list[Suggestion]

    @property
    def fits(self) -> bool:
        """Whether a step has the memory that it takes."""
        return self.trace.peak.total() <= self.memory

    @property
    def seconds(self) -> dict[str, float]:
        """Expected seconds of each part of a step; none on a CPU."""
        return {} if self.gpu is None else part_seconds(self.trace, self.gpu)

    def as_dict(self) -> dict[str, Any]:
        """Plain values: bytes, FLOPs, seconds."""
        trace, parameters = self.trace, self.parameters
        part, place = trace.peak_time
        return {
            "model": self.source,
            "device": "cpu" if self.gpu is None else self.gpu.name,
            "parameters": {**vars(parameters), "total": parameters.total},
            "tokens": {"text": trace.text_tokens, "streams": trace.stream_tokens},
            "micro_batches": trace.micro_batches,
            "flops": {part: trace.flops(part) for part in PARTS if part in trace.work},
            "seconds": self.seconds,
            "assumptions": ASSUMPTIONS if self.seconds else "",
            "memory": {
                "available": self.memory,
                "total": trace.peak.total(),
                "activations": trace.activations,
                "kept_for_backward": trace.kept.total() - trace.standing.total(),
                "at_the_peak": {kind: size for kind, size in trace.peak.items() if size},
                "most": {kind: size for kind, size in trace.largest.items() if size},
                "peak_time": f"{part}, {place}" if place else part,
            },
            "fits": self.fits,
            "suggestions": [{"changes": one.changes, "total": one.total} for one in self.suggestions],
        }


def make_plan(config: TrainConfig, gpu: Gpu | None) -> Plan:
    """Plans a run.

    Args:
        config: A validated configuration; of its text only the length counts.
        gpu: What for; None for this machine's CPU.

    Raises:
        ConfigError, UnsupportedBackboneError: The model is not known, or can't be made to think.
    """
    base, source = base_configuration(config)
    backend = "cpu" if gpu is None else "cuda"
    memory = _memory_of_machine() if gpu is None else usable_memory(gpu)
    trace = trace_model(config, base, backend)
    suggestions = []
    if trace.peak.total() > memory:
        suggestions = suggest(config, memory, lambda changed: trace_model(changed, base, backend).peak.total())
    return Plan(config, source, gpu, memory, parameters_of(config, base), trace, suggestions)


def usable_memory(gpu: Gpu) -> int:
    """Bytes that tensors can have."""
    return gpu.memory - int(RESERVED)


def fitting_gpus(trace: Trace) -> dict[str, tuple[bool, float]]:
    """For each known GPU, whether a step fits, and its expected seconds."""
    return {
        name: (trace.peak.total() <= usable_memory(gpu), sum(part_seconds(trace, gpu).values()))
        for name, gpu in GPUS.items()
    }


def parameters_of(config: TrainConfig, base: PreTrainedConfig) -> Parameters:
    """Counts the parameters of a run's model."""
    import_libraries(config)
    with HollowTensors(Ledger(), {}):
        return count_parameters(hollow_model(config, base))


def _memory_of_machine() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
