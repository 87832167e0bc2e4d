"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence

from quietstar.planning.gpus import RESERVED
from quietstar.planning.plan import Plan, fitting_gpus
from quietstar.planning.speed import ASSUMPTIONS
from quietstar.planning.trace import KINDS, OPTIMIZER, PARTS, WEIGHTS

GIBIBYTE, MEBIBYTE = 2**30, 2**20


def plan_text(plan: Plan) -> str:
    """All of it, for a terminal."""
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
    """Bytes: the weights, or with adapters what is trained of them, and the optimizer's state."""
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
