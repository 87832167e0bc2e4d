"""What an H200 has to reach, and what no kernel can beat there: bytes and operations counted, without a GPU.

    python benchmarks/bars.py

The bars are times of the kernels at 8 texts of 256 tokens, streams of 16 and Mistral-7B's heads in bfloat16, and the
utilisation of a whole step. Beside each stands an estimate from what its kernels do, never a measurement: how long the
operations, the bytes through memory or the bytes through the second level cache take at least, whichever is longest,
for each kernel. Attention counts the tiles that the pinned configurations of sm_90 compute and load, head and sampling
the products and passes of their chunks. Launches, and what a kernel waits for, are not in it.

The plan of the step that `engine_throughput.py` takes stands below: `python -m quietstar.plan`'s model, without the
optimizer. `on_gpu.py` puts what it measures beside all of this.
"""

from __future__ import annotations

import csv
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

from benchmarks.environment import markdown_table
from benchmarks.script import RESULTS, Benchmark

ARCHITECTURE, GPU = "sm_90", "H200"
CACHE_BANDWIDTH = 5.5e12
"""Bytes a second from the second level cache to all multiprocessors: an assumption, no data sheet has it."""
TABLE = RESULTS / "bars.csv"
NOT_ESTIMATED = "-"


@dataclass(frozen=True)
class Bar:
    """A number to reach on an H200.

    Attributes:
        name: What is measured.
        must, moonshot: Milliseconds or % of the measured peak, or how many times the other side's time.
        unit: "ms", "x" or "%".
        part: The part of `on_gpu.py` that measures it.
        row: Columns of its row in that part's CSV file.
        column: Column of the number.
        against: The other side's part and row, of which the fastest variant counts.
    """

    name: str
    must: float
    moonshot: float
    unit: str
    part: str
    row: Mapping[str, str]
    column: str = "ms"
    against: tuple[str, Mapping[str, str]] | None = None


_ATTENTION = {"model": "mistral-7b", "L": "256", "S": "16"}
BARS = [
    Bar("forward", 0.30, 0.23, "ms", "attention", {**_ATTENTION, "work": "forward", "side": "triton"}),
    Bar("backward", 1.35, 1.0, "ms", "attention", {**_ATTENTION, "work": "backward", "side": "triton"}),
    Bar("16 sampling steps", 0.90, 0.55, "ms", "attention", {**_ATTENTION, "work": "steps", "side": "triton"}),
    Bar(
        "head, forward and backward, 8,192 rows",
        *(11.0, 9.6, "ms", "head"),
        {"loss": "mixed", "model": "mistral-7b", "N": "8192", "work": "both", "side": "triton"},
    ),
    Bar(
        "sampling, 2,048 rows",
        *(0.85, 0.76, "ms", "sampling"),
        {"model": "mistral-7b", "N": "2048", "work": "sample", "side": "triton"},
    ),
    *(
        Bar(
            f"{work} against FlexAttention's best",
            *(1.25, 2.0, "x", "attention"),
            {**_ATTENTION, "work": work, "side": "triton"},
            against=("flex", {**_ATTENTION, "work": work, "side": "flex"}),
        )
        for work in ("forward", "backward")
    ),
    Bar("Mistral-7B step, of the measured peak", 50, 60, "%", "engine", {"backend": "triton"}, "of_measured"),
]


def bar(name: str) -> tuple[float, float]:
    """What a bar must reach, and the moonshot."""
    return next((one.must, one.moonshot) for one in BARS if one.name == name)


# ------------------------------------------------------------------------------------------------- tiles of attention


@dataclass(frozen=True)
class Heads:
    """A problem of thought attention in 16 bits: every text position is the anchor of a stream."""

    batch: int = 8
    length: int = 256
    tokens: int = 16
    keys: int = 16
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128

    @property
    def rows_of_stream(self) -> int:
        """Query rows of one stream that share a key head."""
        return self.tokens * (self.heads // self.kv_heads)


@dataclass
class Program:
    """What one program of a kernel moves between cache and multiprocessor, and computes.

    Attributes:
        bytes: By tensor, read or written.
        flops: Of its matrix products, with what a mask hides.
    """

    bytes: Counter[str]
    flops: int


def forward_programs(problem: Heads, tile: Mapping[str, int]) -> Iterator[Program]:
    """The programs of `forward_kernel` for one text and key head.

    Args:
        problem: Sizes.
        tile: BLOCK_M, BLOCK_N and BLOCK_OWN of the kernel.
    """
    D, stream_rows, block = problem.head_size, problem.rows_of_stream, tile["BLOCK_M"]
    row_count = problem.length * stream_rows
    for first in range(0, row_count, block):
        rows = min(block, row_count - first)
        last_stream = (first + rows - 1) // stream_rows
        own = (last_stream - first // stream_rows + 1) * problem.keys
        text = last_stream + 1
        moved = {"q": rows * D, "text K, V": 2 * text * D, "own K, V": 2 * own * D, "out": rows * D}
        keys = _whole(text, tile["BLOCK_N"]) + _whole(own, tile["BLOCK_OWN"])
        yield Program(
            Counter({name: 2 * count for name, count in moved.items()} | {"lse": 4 * rows}), 4 * block * keys * D
        )


def streams_programs(problem: Heads, tile: Mapping[str, int]) -> Iterator[Program]:
    """The programs of `backward_streams_kernel` for one text and key head, where a program is one block of rows.

    Raises:
        ValueError: A program is more than one block.
    """
    from quietstar_kernels.thought_attention.op import streams_in_tile

    D, stream_rows, block = problem.head_size, problem.rows_of_stream, tile["BLOCK_M"]
    streams = streams_in_tile(problem.length, stream_rows, block)
    if streams * stream_rows > block:
        raise ValueError(f"BLOCK_M: got {block}, wanted at least {streams * stream_rows}, the rows of a program")
    for first in range(0, problem.length, streams):
        here = min(streams, problem.length - first)
        rows, own, text = here * stream_rows, here * problem.keys, first + here
        moved = {"q": 2 * rows * D, "out": 2 * rows * D, "text K, V": 2 * text * D, "own K, V": 4 * own * D}
        keys = 6 * _whole(text, tile["BLOCK_N"]) + 10 * _whole(own, tile["BLOCK_OWN"])
        yield Program(
            Counter({name: 2 * count for name, count in moved.items()} | {"lse": 12 * rows}), block * keys * D
        )


def text_programs(problem: Heads, tile: Mapping[str, int], splits: int) -> Iterator[Program]:
    """The programs of `backward_text_kernel` for one text and key head; their parts are float32."""
    D, stream_rows, block = problem.head_size, problem.rows_of_stream, tile["BLOCK_M"]
    for first in range(0, problem.length, tile["BLOCK_N"]):
        keys = min(tile["BLOCK_N"], problem.length - first)
        row_count = (problem.length - first) * stream_rows
        blocks = math.ceil(row_count / block)
        for split in range(splits):
            begin, end = split * blocks // splits, (split + 1) * blocks // splits
            rows = min(end * block, row_count) - begin * block
            moved = {"q": 2 * rows * D, "out": 2 * rows * D, "text K, V": 2 * 2 * keys * D + 2 * 4 * keys * D}
            flops = 8 * (end - begin) * block * tile["BLOCK_N"] * D
            yield Program(Counter(moved | {"lse": 8 * rows}), flops)


def _whole(count: int, block: int) -> int:
    return math.ceil(count / block) * block


def launch_total(problem: Heads, programs: Iterable[Program]) -> Program:
    """All programs of a launch together, from those of one text and key head."""
    total = Program(Counter(), 0)
    for one in programs:
        total.bytes.update(one.bytes)
        total.flops += one.flops
    times = problem.batch * problem.kv_heads
    return Program(Counter({name: times * count for name, count in total.bytes.items()}), times * total.flops)


TILES = ((64, 32), (64, 64), (128, 32), (128, 64), (256, 64))
"""BLOCK_M and BLOCK_N of the table of tiles; the second of a pair changes the operations alone."""


def tiles_table(problem: Heads) -> list[list[str]]:
    """For each tile of the forward pass: bytes of a program on average and of the whole launch, by tensor."""
    lines = []
    for rows, keys in TILES:
        programs = list(forward_programs(problem, {"BLOCK_M": rows, "BLOCK_N": keys, "BLOCK_OWN": 32}))
        total = launch_total(problem, programs)
        moved = sum(total.bytes.values())
        count = problem.batch * problem.kv_heads * len(programs)
        lines.append(
            [
                f"{rows} x {keys}",
                f"{count:,}",
                *(f"{total.bytes[name] / count / 1024:.1f}" for name in ("q", "text K, V", "own K, V", "out")),
                *(f"{total.bytes[name] / 1e6:.0f}" for name in ("q", "text K, V", "own K, V", "out")),
                f"{moved / 1e6:.0f}",
                f"{1000 * moved / CACHE_BANDWIDTH:.3f}",
                f"{total.flops / 1e9:.0f}",
            ]
        )
    return lines


TILE_COLUMNS = [
    *("rows x keys", "programs", "KiB a program: q", "text K, V", "own K, V", "out"),
    *("MB a launch: q", "text K, V", "own K, V", "out", "with lse", "ms at 5.5 TB/s", "GFLOP"),
]

# ---------------------------------------------------------------------------------------------------------- estimates


def least_time(kernels: Iterable[tuple[float, float, float]]) -> dict[str, float]:
    """Seconds by what bounds a kernel, the longest of "products", "memory" and "cache"; kernels run one after another.

    Args:
        kernels: Operations, bytes through memory and bytes through the second level cache of each.
    """
    from quietstar.planning.gpus import GPUS

    rates = {"products": 1e12 * GPUS[GPU].bf16_tflops, "memory": GPUS[GPU].bandwidth, "cache": CACHE_BANDWIDTH}
    seconds: Counter[str] = Counter()
    for amounts in kernels:
        by = {name: amount / rate for (name, rate), amount in zip(rates.items(), amounts, strict=True)}
        longest = max(by, key=lambda name: by[name])
        seconds[longest] += by[longest]
    return dict(sorted(seconds.items()))


def configuration(kernel: str) -> Mapping[str, int]:
    """The pinned line of a kernel of attention in 16 bits for heads of 128."""
    from quietstar_kernels.configurations import table

    return table()[ARCHITECTURE][f"thought_attention.{kernel}"]["16-bit D128"]


def attention_estimates(problem: Heads) -> dict[str, dict[str, float]]:
    """Of the forward pass, the backward pass and all sampling steps."""
    import torch

    from benchmarks.thought_attention import Shape
    from quietstar_kernels.thought_attention.op import grad_text_parts

    B, L, S, _, H, Hkv, D = astuple(problem)
    shape = Shape("mistral-7b", L, S, B, H, Hkv, D)

    def kernel(programs: Iterable[Program], memory: float) -> tuple[float, float, float]:
        total = launch_total(problem, programs)
        return total.flops, memory, sum(total.bytes.values())

    text = configuration("backward_text")
    with torch.device("meta"):
        splits = grad_text_parts(torch.empty(B, L, S, H, D), torch.empty(B, L, Hkv, D), dict(text))
    queries, text_bytes, lse = 2 * B * L * S * H * D, 2 * 2 * B * L * Hkv * D, 4 * B * L * S * H
    parts = splits * 2 * text_bytes  # in float32
    steps = []
    for t in range(1, S + 1):
        once = 2 * queries // S + 2 * 2 * B * L * t * Hkv * D + text_bytes
        steps.append(kernel(forward_programs(replace(problem, tokens=1, keys=t), configuration("step")), once))
    forward = kernel(forward_programs(problem, configuration("forward")), shape.least_bytes("forward", 2))
    backward = [
        kernel(
            streams_programs(problem, configuration("backward_streams")),
            shape.least_bytes("backward", 2) - text_bytes + 2 * lse,
        ),
        kernel(text_programs(problem, text, splits), 2 * queries + text_bytes + 2 * lse + parts),
        (0.0, parts + text_bytes, 0.0),  # the sum of the parts
    ]
    return {
        "forward": least_time([forward]),
        "backward": least_time(backward),
        "16 sampling steps": least_time(steps),
    }


def head_estimates() -> dict[str, dict[str, float]]:
    """Of the loss after the mixing head with all gradients, and of sampling, from the plan's ledger of their chunks."""
    import torch

    from benchmarks.mixed_cross_entropy import MODELS
    from quietstar.planning.kernels import cuda_kernels
    from quietstar.planning.meta_tensors import Ledger, MetaTensors
    from quietstar_kernels import mixed_cross_entropy, sample_tokens

    V, E = (MODELS["mistral-7b"][name] for name in ("vocabulary", "hidden"))
    found = {}
    for name, N in (("head, forward and backward, 8,192 rows", 8192), ("sampling, 2,048 rows", 2048)):
        ledger = Ledger()
        with MetaTensors(ledger, cuda_kernels(ledger)):
            base, thought, head = (torch.empty(rows, E, dtype=torch.bfloat16).requires_grad_() for rows in (N, N, V))
            weight, target, row_weight = torch.empty(N).requires_grad_(), torch.zeros(N).long(), torch.empty(N)
            ledger.restart()
            if name.startswith("sampling"):
                sample_tokens(base, head, seed=0)
            else:
                mixed_cross_entropy(base, thought, weight, head, target, row_weight=row_weight)[0].backward()
        works = [(work, times) for counts in ledger.work.values() for work, times in counts.items()]
        found[name] = least_time((work.flops, work.bytes, 0.0) for work, times in works for _ in range(round(times)))
    return found


ENGINE = (
    "--preset mistral-7b --data.path . --objective.preset default --model.thought_length 12 "
    "--training.master_weights false"
)
"""The step of `on_gpu.py`'s part `engine`, as arguments of `python -m quietstar.plan`."""
USEFUL = "useful share of the peak, %"


def plan_of_the_engine() -> dict[str, float]:
    """The rows of the plan, and the share of the data sheet's peak that is useful."""
    from benchmarks.engine_throughput import MODELS, Shape
    from quietstar.config.commands import parse_train_config
    from quietstar.planning.gpus import GPUS
    from quietstar.planning.model import base_configuration
    from quietstar.planning.plan import part_seconds
    from quietstar.planning.trace import OPTIMIZER, STEP, trace_model

    config = parse_train_config(ENGINE.split())
    trace = trace_model(config, base_configuration(config)[0], "cuda")
    parts = {part: value for part, value in part_seconds(trace, GPUS[GPU]).items() if part != STEP}
    shape = Shape(**{**MODELS["mistral-7b"], "batch": config.training.batch_size, "thought_length": 12})
    seconds = sum(parts.values())
    peak = max(kinds.total() - kinds[OPTIMIZER] for (part, _), kinds in trace.peaks.items() if part != STEP)
    return {
        "seconds": seconds,
        "GiB at the peak": peak / 2**30,
        "10^12 operations": sum(trace.flops(part) for part in parts) / 1e12,
        USEFUL: 100 * sum(shape.flops().values()) / seconds / (1e12 * GPUS[GPU].bf16_tflops),
    }


def estimates() -> list[dict[str, str]]:
    """The rows of the table: bars, then the plan."""
    found = attention_estimates(Heads()) | head_estimates()
    plan = plan_of_the_engine()
    rows = []
    for one in BARS:
        estimate, basis = NOT_ESTIMATED, "none: what FlexAttention takes is not known without a run"
        if one.name in found:
            seconds = found[one.name]
            estimate = f"{1000 * sum(seconds.values()):.2f}"
            basis = "at least " + ", ".join(f"{1000 * value:.2g} ms by {name}" for name, value in seconds.items())
        elif one.part == "engine":
            estimate, basis = f"{plan.pop(USEFUL):.0f}", "by the plan, of the data sheet's peak"
        numbers = {"must": f"{one.must:g}", "moonshot": f"{one.moonshot:g}", "estimate": estimate}
        rows.append({"kind": "bar", "name": one.name, "unit": one.unit, **numbers, "basis": basis})
    empty = dict.fromkeys(rows[0], "")
    return rows + [empty | {"kind": "plan", "name": name, "estimate": f"{value:.4g}"} for name, value in plan.items()]


# ------------------------------------------------------------------------------------------- beside what was measured


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a benchmark's CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("# ")))


def measured_rows(folders: Mapping[str, Path], part: str) -> list[dict[str, str]]:
    """All rows that a part has written; none where it was not reached.

    Args:
        folders: Folder of each part that was.
        part: Name of the part.
    """
    files = sorted(folders[part].glob("*.csv")) if part in folders else []
    return [row for file in files for row in read(file)]


def numbers(
    rows: Iterable[Mapping[str, str]], wanted: Mapping[str, str], column: str, *, variants: bool
) -> list[float]:
    """The numbers in a column of the rows with these values.

    Args:
        rows: Of a CSV file.
        wanted: Value of each column.
        column: The numbers' column.
        variants: Whether variants of a side or backend, such as "flex, 64 x 64", count too.
    """

    def agrees(found: str, value: str) -> bool:
        return found == value or (variants and found.startswith(f"{value}, "))

    fitting = (row for row in rows if all(agrees(row.get(name) or "", value) for name, value in wanted.items()))
    return [float(row[column]) for row in fitting if row.get(column)]


def measured(one: Bar, folders: Mapping[str, Path]) -> float | None:
    """The number of a bar in its unit, from the files of a visit: of a step the best variant, of a kernel ours."""
    of_step = one.unit == "%"
    found = numbers(measured_rows(folders, one.part), one.row, one.column, variants=of_step)
    if not found or of_step:
        return 100 * max(found) if found else None
    if one.against is None:
        return min(found)
    others = numbers(measured_rows(folders, one.against[0]), one.against[1], one.column, variants=True)
    return min(others) / min(found) if others else None


def verdict(one: Bar, value: float | None) -> str:
    """What a measurement says of a bar."""
    if value is None:
        return "not measured"
    reached = [value <= wanted if one.unit == "ms" else value >= wanted for wanted in (one.must, one.moonshot)]
    return "moonshot" if reached[1] else "met" if reached[0] else "missed"


COLUMNS = ["bar", "must", "moonshot", "measured", "", "estimate, not measured", "by"]
PLAN_COLUMNS = ["of the engine's step", "planned, not measured", "measured"]


def tables(rows: Sequence[Mapping[str, str]], folders: Mapping[str, Path]) -> str:
    """The bars and the plan in Markdown, with what the parts of a visit have measured.

    Args:
        rows: Those of `estimates`.
        folders: Folder of each part that was reached.
    """
    by_name = {one.name: one for one in BARS}
    lines, plan = [], []
    engine = next((row for row in measured_rows(folders, "engine") if row.get("backend") == "triton"), {})
    for row in rows:
        if row["kind"] == "bar":
            one = by_name[row["name"]]
            value, unit = measured(one, folders), row["unit"]
            estimate = row["estimate"] if row["estimate"] == NOT_ESTIMATED else f"{row['estimate']} {unit}"
            shown = "-" if value is None else f"{value:.3g} {unit}"
            wanted = [f"{row[name]} {unit}" for name in ("must", "moonshot")]
            lines.append([row["name"], *wanted, shown, verdict(one, value), estimate, row["basis"]])
        else:
            plan.append([row["name"], row["estimate"], _of_the_engine(row["name"], engine)])
    return f"{markdown_table(COLUMNS, lines)}\n\n{markdown_table(PLAN_COLUMNS, plan)}"


def _of_the_engine(name: str, row: Mapping[str, str]) -> str:
    """What a step's row says of a line of the plan; operations are counted, not measured."""
    columns = {"seconds": ["seconds"], "GiB at the peak": ["weight_bytes", "peak_bytes_above_weights"]}.get(name, [])
    if not columns or not all(row.get(column) for column in columns):
        return "-"
    return f"{sum(float(row[column]) for column in columns) / (2**30 if 'GiB' in name else 1):.4g}"


def section(folders: Mapping[str, Path]) -> str:
    """The bars for a page of measurements, with the committed estimates."""
    return f"{tables(read(TABLE), folders)}\n\n{about()}"


def about() -> str:
    """What the estimates rest on."""
    return (
        "Estimates are no measurements: for each kernel the longest of its operations at 989 TFLOP/s, its bytes "
        "through memory at 4.8 TB/s, both by the data sheet, and its bytes through the second level cache at "
        f"{CACHE_BANDWIDTH / 1e12:g} TB/s, which is assumed; launches and waits come on top. The plan assumes matrix "
        "products at 60 % of the data sheet's peak and memory at 75 % of its bandwidth."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Benchmark(__file__, __doc__)
    parser.add_out("bars.md")
    options = parser.begin(arguments)
    rows = estimates()
    body = [
        "H200; 8 texts of 256 tokens, streams of 16, 32:8 heads of 128, bfloat16. Nothing here is measured.",
        tables(rows, {}),
        about(),
        f"The plan: `python -m quietstar.plan {ENGINE}`, without the optimizer's part.",
        "## What a tile of the forward pass moves",
        "Between cache and multiprocessors, each program for itself; keys as far as a row of the tile sees them.",
        markdown_table(TILE_COLUMNS, tiles_table(Heads())),
    ]
    parser.write(options.out, "Bars and estimates", "\n\n".join(body), rows)


if __name__ == "__main__":
    main()
