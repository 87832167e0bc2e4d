"""The plan of a run: its model, the memory, work and time of its steps, and whether a device has that memory.

`make_plan` is read first. `part_seconds` estimates the time of a step on a GPU, `suggest` tries changes with which a
run fits, and `plan_text` writes the plan for a terminal.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from transformers import PreTrainedConfig

from quietstar.config.training import Replay, TrainConfig, validate
from quietstar.errors import ConfigError
from quietstar.planning.gpus import GPUS, RESERVED, Gpu
from quietstar.planning.meta_tensors import Ledger, MetaTensors, Work
from quietstar.planning.model import Parameters, base_configuration, count_parameters, import_libraries, meta_model
from quietstar.planning.trace import KINDS, OPTIMIZER, PARTS, WEIGHTS, Trace, trace_model

Changes = dict[str, Any]
"""Values of options by dotted key."""

Peak = Callable[[TrainConfig], int]
"""A function that returns the bytes at the peak of a run."""

GIBIBYTE, MEBIBYTE = 2**30, 2**20

PRODUCTS, BANDWIDTH, START = 0.6, 0.75, 5e-6
"""Assumptions on a GPU: share of its peak arithmetic that products reach, share of its bandwidth that is reached, and
least seconds of an operation."""

ASSUMPTIONS = (
    f"matrix products at {PRODUCTS:.0%} of the GPU's peak, memory at {BANDWIDTH:.0%} of its bandwidth, "
    f"{START * 1e6:.0f} us an operation at least"
)

LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Args:
        config: Configuration of the run.
        source: Name of where the model's configuration comes from.
        gpu: GPU that the run is planned for; None for this machine's CPU.
        memory: Available memory in bytes.
        parameters: Numbers of parameters of the model.
        trace: Memory and work of a step.
        suggestions: Changes with which the run fits, where it does not.
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
        """Whether the available memory is enough for a step."""
        return self.trace.peak.total() <= self.memory

    @property
    def seconds(self) -> dict[str, float]:
        """Expected seconds of each part of a step; none on a CPU."""
        return {} if self.gpu is None else part_seconds(self.trace, self.gpu)

    def as_dict(self) -> dict[str, Any]:
        """Returns the plan as plain values: bytes, FLOPs, seconds."""
        trace, parameters = self.trace, self.parameters
        part, place = trace.peak_time
        return {
            "model": self.source,
            "device": "cpu" if self.gpu is None else self.gpu.name,
            "parameters": {**vars(parameters), "total": parameters.total},
            "replay": self.config.training.replay,
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
        config: Validated configuration of the run; of the texts only their length is used.
        gpu: GPU to plan for; None for this machine's CPU.

    Raises:
        ConfigError, UnsupportedBackboneError: The model is not known, or can't be made to think.
    """
    config = with_stage(config, gpu)
    base, source = base_configuration(config)
    backend = "cpu" if gpu is None else "cuda"
    memory = _memory_for(gpu)
    trace = trace_model(config, base, backend)
    suggestions = []
    if trace.peak.total() > memory:
        suggestions = suggest(config, memory, lambda changed: trace_model(changed, base, backend).peak.total())
    return Plan(config, source, gpu, memory, parameters_of(config, base), trace, suggestions)


def with_stage(config: TrainConfig, gpu: Gpu | None) -> TrainConfig:
    """Returns the configuration of a run with the stage that its `training.replay` stands for, where that is `auto`.

    Args:
        config: Validated configuration of the run.
        gpu: GPU that the run is planned for; None for this machine's CPU.

    Raises:
        ConfigError, UnsupportedBackboneError: The model is not known, or can't be made to think.
    """
    if config.training.replay != "auto":
        return config
    base, _ = base_configuration(config)
    backend = "cpu" if gpu is None else "cuda"
    return choose_replay(config, _memory_for(gpu), lambda tried: trace_model(tried, base, backend).peak.total())


def choose_replay(config: TrainConfig, limit: int, peak: Peak) -> TrainConfig:
    """Returns the configuration with the last stage of `training.replay` with which the run fits.

    Args:
        config: Configuration of the run.
        limit: Available memory in bytes.
        peak: Function that returns the bytes at the peak of a run.
    """
    stages = get_args(Replay) if config.training.method == "quietstar" and config.training.reuse_sampling_pass else ()
    for stage in reversed(stages[1:]):
        changes = {"training.replay": stage}
        total = _peak(config, changes, peak)  # None where the model has no such stage
        if total is not None and total <= limit:
            return with_changes(config, changes)
    return with_changes(config, {"training.replay": "layers"})


def usable_memory(gpu: Gpu) -> int:
    """Returns the number of bytes that tensors can use."""
    return gpu.memory - int(RESERVED)


def fitting_gpus(trace: Trace) -> dict[str, tuple[bool, float]]:
    """Returns for each known GPU whether a step fits, and its expected seconds."""
    return {
        name: (trace.peak.total() <= usable_memory(gpu), sum(part_seconds(trace, gpu).values()))
        for name, gpu in GPUS.items()
    }


def parameters_of(config: TrainConfig, base: PreTrainedConfig) -> Parameters:
    """Counts the parameters of a run's model."""
    import_libraries(config)
    with MetaTensors(Ledger(), {}):
        return count_parameters(meta_model(config, base))


def _memory_for(gpu: Gpu | None) -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if gpu is None else usable_memory(gpu)


def part_seconds(trace: Trace, gpu: Gpu) -> dict[str, float]:
    """Returns the expected seconds of each part of a step: for each operation the longest of arithmetic, memory and
    start.
    """
    return {part: _seconds(work.items(), gpu) for part, work in trace.work.items()}


def _seconds(work: Iterable[tuple[Work, float]], gpu: Gpu) -> float:
    total = 0.0
    for one, times in work:
        tflops = gpu.bf16_tflops if one.dtype in LOW_PRECISION else gpu.float32_tflops
        arithmetic = one.flops / (tflops * 1e12 * PRODUCTS)
        total += times * max(arithmetic, one.bytes / (gpu.bandwidth * BANDWIDTH), START)
    return total


@dataclass(frozen=True)
class Suggestion:
    """Changes with which a run fits.

    Args:
        changes: New values of options by dotted key.
        total: Number of bytes at the peak with these changes.
    """

    changes: Changes
    total: int

    def __str__(self) -> str:
        return " ".join(f"--{key} {_text(value)}" for key, value in self.changes.items())


def suggest(config: TrainConfig, limit: int, peak: Peak) -> list[Suggestion]:
    """Returns single changes with which a run fits; if there are none, several changes together.

    Args:
        config: Configuration of a run that does not fit.
        limit: Available memory in bytes.
        peak: Function that returns the bytes at the peak of a run.

    Returns:
        The suggestions; none if the run does not fit with all changes together.
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
    """Returns the configuration with other values of some options.

    Raises:
        ConfigError: The new values do not go together.
    """
    for key, value in changes.items():
        group, _, name = key.partition(".")
        config = replace(config, **{group: replace(getattr(config, group), **{name: value})})
    return validate(config, ())


def _single_changes(config: TrainConfig) -> Iterator[Changes]:
    """Yields changes, from the one that affects the result least to the one that affects it most."""
    training, finetuning, model = config.training, config.finetuning, config.model
    thinks = training.method == "quietstar"
    if model.dtype == "float32":
        yield {"model.dtype": "bfloat16"}
    if thinks and not training.reuse_sampling_pass:
        yield {"training.reuse_sampling_pass": True}
    if thinks and training.replay not in ("layers", "down"):
        yield {"training.replay": "layers"}
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
    """Returns the largest micro-batch that fits with other changes, if one does; without changes, only smaller ones
    than now.
    """
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


def plan_text(plan: Plan) -> str:
    """Returns the whole plan as text for a terminal."""
    sections = [_head(plan), _work(plan), _memory(plan), _verdict(plan)]
    if plan.gpu is not None:
        sections.append(_gpus(plan))
    return "\n\n".join(sections)


def _head(plan: Plan) -> str:
    config, parameters, trace = plan.config, plan.parameters, plan.trace
    model, training = config.model, config.training
    counts = {
        "base": parameters.base,
        "adapters": parameters.adapters,
        "START and END": parameters.thought_embedding,
        "mixing head": parameters.mixing_head,
    }
    thinking = "language modelling, without thoughts"
    if training.method == "quietstar":
        thinking = (
            f"{model.thoughts_per_position} thoughts of {model.thought_length} tokens at {model.positions} positions, "
            f"lookahead {model.lookahead}"
        )
    count = trace.micro_batches
    facts = {
        "model": f"{plan.source}, {model.dtype}",
        "parameters": ", ".join(f"{name} {value:,}" for name, value in counts.items() if value),
        "trained": f"{parameters.trained:,} ({parameters.trained / parameters.total:.2%})",
        "a step": f"{training.batch_size} texts of {config.data.length} tokens, unpadded, in "
        f"{count} micro-batch{'es' if count > 1 else ''} of {training.batch_size // count}",
        "thinking": thinking,
        "replay": training.replay,
        "tokens": f"{trace.text_tokens:,} of text, {trace.stream_tokens:,} of thought streams",
    }
    return "\n".join(f"{name + ':':12}{value}" for name, value in facts.items())


def _work(plan: Plan) -> str:
    trace, seconds = plan.trace, plan.seconds
    total = sum(trace.flops(part) for part in trace.work)
    rows = []
    for part in (part for part in PARTS if part in trace.work):
        row = [part, f"{trace.flops(part) / 1e12:.4g}", f"{trace.flops(part) / max(1, total):.1%}"]
        rows.append(row + ([f"{seconds[part]:.3g}"] if seconds else []))
    whole = sum(seconds.values())
    rows.append(["a step", f"{total / 1e12:.4g}", "100.0%", *([f"{whole:.3g}"] if seconds else [])])
    columns = ["arithmetic of a step", "TFLOP", "share", *(["expected s"] if seconds else [])]
    table = _table(columns, rows)
    if plan.gpu is None:
        return table
    speed = f"expected {whole:.3g} s a step, {trace.text_tokens / whole:,.0f} text tokens/s on {plan.gpu.name}"
    return f"{table}\n{speed}\nassumed: {ASSUMPTIONS}"


def _memory(plan: Plan) -> str:
    trace = plan.trace
    unit, name = (GIBIBYTE, "GiB") if trace.peak.total() >= GIBIBYTE else (MEBIBYTE, "MiB")

    def row(kind: str, at_peak: int, most: int | None, meaning: str) -> list[str]:
        return [kind, f"{at_peak / unit:.3f}", "" if most is None else f"{most / unit:.3f}", meaning]

    rows = [
        row(kind, trace.peak[kind], trace.largest[kind], meaning)
        for kind, meaning in KINDS.items()
        if trace.largest[kind]
    ]
    rows.append(row("of these, activations", trace.activations, None, "neither weights nor gradients nor optimizer"))
    rows.append(row("all", trace.peak.total(), None, f"at the peak: {_time(plan)}"))
    table = _table(["memory", f"{name} at the peak", f"{name} at most", ""], rows, text_columns=(0, 3))
    training = plan.config.training
    stored = _checkpoint(plan) / unit
    kept = training.keep_checkpoints + training.keep_best
    return (
        f"{table}\na checkpoint: {stored:.3g} {name} on the disk, and as much of the host's memory while it is "
        f"written; up to {kept} are kept, and one more is there for a moment"
    )


def _checkpoint(plan: Plan) -> int:
    """Returns the bytes of a checkpoint: the weights, with adapters only the trained ones, and the optimizer's
    state.
    """
    trace, parameters = plan.trace, plan.parameters
    weights = trace.standing[WEIGHTS]
    if plan.config.finetuning.lora_rank:
        weights = weights * parameters.trained // parameters.total
    return weights + trace.standing[OPTIMIZER]


def _time(plan: Plan) -> str:
    part, place = plan.trace.peak_time
    return f"{part}, {place}" if place else part


def _verdict(plan: Plan) -> str:
    need, have = plan.trace.peak.total() / GIBIBYTE, plan.memory / GIBIBYTE
    if plan.gpu is None:
        where = f"this machine's CPU ({have:.1f} GiB)"
    else:
        where = (
            f"{plan.gpu.name} ({plan.gpu.memory / GIBIBYTE:.1f} GiB, of which {RESERVED / GIBIBYTE:.1f} are assumed "
            "to go to CUDA, its libraries and gaps)"
        )
    lines = [f"{'fits' if plan.fits else 'DOES NOT FIT'}: {need:.2f} GiB on {where}"]
    if not plan.fits and not plan.suggestions:
        lines.append("not even all of the suggestions together make it fit; use a smaller model")
    for one in plan.suggestions:
        lines.append(f"  fits with {one}: {one.total / GIBIBYTE:.2f} GiB")
    return "\n".join(lines)


def _gpus(plan: Plan) -> str:
    rows = [
        [name, "yes" if fits else "no", f"{seconds:.3g}"] for name, (fits, seconds) in fitting_gpus(plan.trace).items()
    ]
    return _table(["GPU", "fits", "expected s a step"], rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int] = (0,)) -> str:
    cells = [list(columns), *map(list, rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(columns))]
    lines = [
        "  ".join(
            cell.ljust(width) if k in text_columns else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
