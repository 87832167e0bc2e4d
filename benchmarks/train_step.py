"""One training step of the engine against the direct way: time, peak memory, and how both grow.

    python benchmarks/train_step.py

A step is the loss of one batch and its gradients: sampling the thoughts, the differentiable passes, `backward()`.
The sides, one model, built from one seed:

* `naive`: the released code's way (`naive_step.py`), full logits and a mixed prediction at every pass;
* `naive_lean`: the same without the mixed predictions whose loss is thrown away;
* `engine`: `learn(model, ...)`, whose sampling pass is its checkpointed forward;
* `engine_down`, `engine_mlp`, `engine_linears`, `engine_all`: the same with that stage of `replay`;
* `engine_two_pass`: `learn(model, ..., reuse_sampling_pass=False)`, which samples first and then runs a second forward.

First a check in which every side gets the same thoughts: loss and all gradients must agree. Then each measurement runs
in a process of its own, in which the side samples its thoughts itself. Two sweeps: text length L at a fixed stream
length S, and S at a fixed L. On a CPU (Linux) the time is CPU time of the process (user + system, all threads), and the
memory is the peak of the resident set above what it is once the model is built and a step on a few tokens has loaded
what torch loads lazily; on CUDA the time is that of events on the stream and the memory that of torch's allocator. A
side that runs out of memory is a row that says so.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

from benchmarks.environment import markdown_table
from benchmarks.script import RESULTS, Benchmark, WithDefaults

# torch is imported where a measurement needs it and not here: the parent only waits, and should take no memory (or GPU)
# from the child that it measures.

STAGES = {"engine": "layers", **{f"engine_{stage}": stage for stage in ("down", "mlp", "linears", "all")}}
"""Stage of `replay` of each side that reuses its sampling pass."""
SIDES = ("naive", "naive_lean", *STAGES, "engine_two_pass")
OUT_OF_MEMORY = "out of memory"
MEBIBYTE = 2**20


@dataclasses.dataclass(frozen=True)
class Shape:
    """One point of a sweep. S = thought_length + 2 + lookahead - 1."""

    length: int
    thought_length: int
    lookahead: int
    batch: int
    thoughts_per_position: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int

    @property
    def stream_length(self) -> int:
        return self.thought_length + 2 + self.lookahead - 1


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Everything of a measurement that is not the shape."""

    device: str
    dtype: str
    threads: int
    seed: int


# ---------------------------------------------------------------------------------------------- the sides, in a child


class Step:
    """One side on one model: `forward()` returns a loss that carries gradients."""

    def __init__(self, side: str, shape: Shape, conditions: Conditions) -> None:
        import torch
        from transformers import AutoModelForCausalLM, MistralConfig

        self.side, self.shape, self.conditions = side, shape, conditions
        self.device = torch.device(conditions.device)
        torch.manual_seed(conditions.seed)
        base = AutoModelForCausalLM.from_config(
            MistralConfig(
                vocab_size=shape.vocabulary,
                hidden_size=shape.hidden,
                intermediate_size=shape.intermediate,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                max_position_embeddings=shape.length + shape.stream_length,
                sliding_window=None,
                attn_implementation="sdpa",
            ),
            dtype=getattr(torch, conditions.dtype),  # built so, its rotary frequencies stay float32
        )
        base.to(device=self.device)
        delimiters = torch.randn(2, shape.hidden) * base.config.initializer_range
        (self._build_naive if side.startswith("naive") else self._build_engine)(base, delimiters)

    def _build_naive(self, base: Any, delimiters: Any) -> None:
        import torch
        from torch import nn

        hidden = self.shape.hidden
        self.base = base
        self.mixing_head = nn.Sequential(
            nn.Linear(2 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )
        self.mixing_head.to(device=self.device, dtype=base.dtype)
        self.delimiters = nn.Parameter(delimiters.to(device=self.device, dtype=base.dtype))
        with torch.no_grad():
            self.mixing_head[-1].weight.zero_()
            self.mixing_head[-1].bias.fill_(0.1)

    def _build_engine(self, base: Any, delimiters: Any) -> None:
        import torch

        from quietstar.model.modeling import QuietStarForCausalLM

        self.model = QuietStarForCausalLM.from_base(
            base,
            start_text=[0],  # token ids: this base has no tokenizer, and the vectors are overwritten below
            end_text=[0],
            thought_length=self.shape.thought_length,
            lookahead=self.shape.lookahead,
            thoughts_per_position=self.shape.thoughts_per_position,
            initial_mixing_weight=0.1,
        )
        with torch.no_grad():
            self.model.thought_embedding.weight.copy_(delimiters)

    def text(self, length: int) -> Any:
        import torch

        generator = torch.Generator().manual_seed(self.conditions.seed + 1)
        ids = torch.randint(self.shape.vocabulary, (self.shape.batch, length), generator=generator)
        return ids.to(self.device)

    def forward(self, input_ids: Any, thought_tokens: Any = None, objective: str = "default") -> Any:
        """The loss of one step.

        Args:
            input_ids: int64 [B, L].
            thought_tokens: int64 [B, K, L, T]; None samples them.
            objective: "default" or "authors".
        """
        if self.side.startswith("naive"):
            return self._naive_loss(input_ids, thought_tokens, objective)
        return self._engine_loss(input_ids, thought_tokens, objective)

    def _naive_loss(self, input_ids: Any, thought_tokens: Any, objective: str) -> Any:
        from benchmarks.naive_step import OBJECTIVES, naive_step

        # The result is kept: so are, in the released code, the losses that only its log shows.
        self.result = naive_step(
            self.base,
            self.mixing_head,
            self.delimiters[0],
            self.delimiters[1],
            input_ids,
            thoughts_per_position=self.shape.thoughts_per_position,
            thought_length=self.shape.thought_length,
            lookahead=self.shape.lookahead,
            objective=OBJECTIVES[objective],
            thought_tokens=None if thought_tokens is None else thought_tokens.flatten(0, 1),
            intermediate_predictions=self.side == "naive",
        )
        return self.result.loss

    def _engine_loss(self, input_ids: Any, thought_tokens: Any, objective: str) -> Any:
        from quietstar.objective.learning import learn

        replay: Any = STAGES.get(self.side)
        options = {"reuse_sampling_pass": False} if replay is None else {"replay": replay}
        thoughts = None
        if thought_tokens is not None:
            streams = thought_tokens[:, :, :-1].transpose(1, 2).flatten(1, 2)  # nothing follows the last position
            thoughts = self.model.think(input_ids, tokens=streams, record=replay is not None, replay=replay or "layers")
        self.result = learn(
            self.model,
            input_ids,
            thoughts=thoughts,
            objective=objective,
            seed=self.conditions.seed,
            **options,
        )
        return self.result.loss

    def clear(self) -> None:
        self.result = None
        for parameter in self.parameters().values():
            parameter.grad = None

    def parameters(self) -> dict[str, Any]:
        """Parameters by a name that both kinds of side share."""
        if self.side.startswith("naive"):
            named = {f"base.{name}": p for name, p in self.base.named_parameters()}
            named |= {f"mixing_head.{name}": p for name, p in self.mixing_head.named_parameters()}
            return named | {"thought_embedding.weight": self.delimiters}
        return {name.replace("mixing_head.layers.", "mixing_head."): p for name, p in self.model.named_parameters()}


def prepare(conditions: Conditions) -> None:
    import torch

    torch.set_num_threads(conditions.threads)
    with suppress(OSError):  # if memory runs out, this process is the one to go, not the table's or a neighbour's
        Path("/proc/self/oom_score_adj").write_text("1000")


def measure(side: str, shape: Shape, conditions: Conditions) -> dict[str, Any]:
    """Time and peak memory of one forward and backward; in a fresh process."""
    prepare(conditions)
    step = Step(side, shape, conditions)
    step.forward(step.text(shape.lookahead + 8)).backward()
    step.clear()
    input_ids = step.text(shape.length)
    meter = cuda_meter if conditions.device.startswith("cuda") else cpu_meter
    with meter() as reading:
        loss = step.forward(input_ids)
        loss.backward()
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"{side} at {shape}: loss is {loss.item()}")
    return reading


@contextmanager
def cpu_meter() -> Iterator[dict[str, Any]]:
    """Fills the dict with `seconds` (user + system, all threads), `wall_seconds` and `peak_bytes` as the block ends."""
    ctypes.CDLL(None).malloc_trim(0)  # memory freed while building would otherwise be there for the step to use unseen
    reading: dict[str, Any] = {}
    with PeakResidentSet() as resident:
        wall, cpu = time.perf_counter(), time.process_time()
        yield reading
        reading["seconds"] = time.process_time() - cpu
        reading["wall_seconds"] = time.perf_counter() - wall
    reading["peak_bytes"] = resident.increase


class PeakResidentSet:
    """How far the resident set rose above where it stood on entry, in bytes.

    The kernel's high-water mark is reset on entry and read on exit. Where it cannot be reset (some containers), a
    thread that reads the current size every few milliseconds stands in.
    """

    INTERVAL = 0.003

    def __enter__(self) -> PeakResidentSet:
        self._sampled = self._before = self.current()
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._resettable = True
        except OSError:
            self._resettable = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        peak = max(self._sampled, self.high_water_mark()) if self._resettable else self._sampled
        self.increase = peak - self._before

    def _sample(self) -> None:
        while not self._done.wait(self.INTERVAL):
            self._sampled = max(self._sampled, self.current())

    @staticmethod
    def current() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @staticmethod
    def high_water_mark() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return 0


@contextmanager
def cuda_meter() -> Iterator[dict[str, Any]]:
    """As `cpu_meter`, with the stream's time and the allocator's peak."""
    import torch

    reading: dict[str, Any] = {}
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    wall = time.perf_counter()
    begin.record()
    yield reading
    end.record()
    torch.cuda.synchronize()
    reading["wall_seconds"] = time.perf_counter() - wall
    reading["seconds"] = begin.elapsed_time(end) / 1000
    reading["peak_bytes"] = torch.cuda.max_memory_allocated() - before


def check(sides: Sequence[str], shape: Shape, conditions: Conditions) -> dict[str, Any]:
    """Loss and gradients of every side against those of the first, the same thoughts given to all.

    Returns:
        One row per objective and side: the loss's relative difference, and the largest over all parameters of the
        gradient's (norm of the difference over the norm).
    """
    import torch

    prepare(conditions)
    shared = Step(sides[0], shape, conditions)
    input_ids = shared.text(shape.length)
    generator = torch.Generator().manual_seed(conditions.seed + 2)
    tokens_shape = (shape.batch, shape.thoughts_per_position, shape.length, shape.thought_length)
    tokens = torch.randint(shape.vocabulary, tokens_shape, generator=generator).to(shared.device)
    # The head's last layer starts at zero; anything else, or half of the gradients would be compared at zero.
    values = {name: p.detach().clone() for name, p in shared.parameters().items()}
    values["mixing_head.4.weight"].normal_(std=0.05)
    values["mixing_head.0.bias"].normal_(std=0.05)

    rows = []
    for objective in ("default", "authors"):
        expected: tuple[float, dict[str, Any]] | None = None
        for side in sides:
            step = Step(side, shape, conditions)
            with torch.no_grad():
                for name, parameter in step.parameters().items():
                    parameter.copy_(values[name])
            loss = step.forward(input_ids, tokens, objective)
            loss.backward()
            found = (loss.item(), {name: p.grad for name, p in step.parameters().items()})
            expected = expected or found
            rows.append({"objective": objective, "side": side, "loss": found[0], **difference(found, expected)})
    return {"rows": rows}


def difference(found: tuple[float, dict[str, Any]], expected: tuple[float, dict[str, Any]]) -> dict[str, Any]:
    if found[1].keys() != expected[1].keys():
        raise ValueError(f"parameters differ: {sorted(found[1].keys() ^ expected[1].keys())}")
    relative = {
        name: float((found[1][name] - gradient).norm() / gradient.norm()) for name, gradient in expected[1].items()
    }
    worst = max(relative, key=lambda name: relative[name])
    return {
        "loss_difference": abs(found[0] - expected[0]) / abs(expected[0]),
        "worst_gradient_difference": relative[worst],
        "worst_gradient": worst,
    }


# ------------------------------------------------------------------------------------------------------- the parent


def in_child(job: str, **arguments: Any) -> dict[str, Any]:
    """Run `measure` or `check` in a process of its own.

    Returns:
        What it returns, or `{"failure": "out of memory"}` where it was killed or said so.

    Raises:
        RuntimeError: It failed in another way; its error output is in the message.
    """
    encoded = json.dumps({"job": job, **arguments})
    return answer_of(subprocess.run([sys.executable, __file__, "--child", encoded], capture_output=True, text=True))


def answer_of(child: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The child's last line; see `in_child`."""
    if child.returncode == 0:
        answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
        return answer
    said_so = ("OutOfMemoryError", "MemoryError", "can't allocate memory", "not enough memory")
    if child.returncode == -signal.SIGKILL or any(words in child.stderr for words in said_so):
        return {"failure": OUT_OF_MEMORY}
    raise RuntimeError(f"{shlex.join(child.args)} failed ({child.returncode}):\n{child.stderr}")


def child_main(encoded: str) -> None:
    job = json.loads(encoded)
    shape, conditions = Shape(**job["shape"]), Conditions(**job["conditions"])
    if job["job"] == "check":
        answer = check(job["sides"], shape, conditions)
    else:
        answer = measure(job["side"], shape, conditions)
    print(json.dumps(answer))


def sweep_points(options: argparse.Namespace) -> list[tuple[str, Shape]]:
    """Every point once per sweep: ("L", shape) of the sweep over lengths, ("S", shape) of the one over streams."""
    default = Shape(
        length=options.stream_sweep_length,
        thought_length=options.thought_length,
        lookahead=options.lookahead,
        batch=options.batch,
        thoughts_per_position=options.thoughts,
        hidden=options.hidden,
        layers=options.layers,
        heads=options.heads,
        kv_heads=options.kv_heads,
        intermediate=options.intermediate,
        vocabulary=options.vocabulary,
    )
    points = [("L", dataclasses.replace(default, length=length)) for length in options.lengths]
    for stream_length in options.stream_lengths:
        thought_length = stream_length - 1 - options.lookahead
        if thought_length < 1:
            raise SystemExit(
                f"error: --stream-lengths {stream_length}: START, END and a lookahead of {options.lookahead} take "
                f"{options.lookahead + 1}, and a thought needs at least one token"
            )
        points.append(("S", dataclasses.replace(default, thought_length=thought_length)))
    return points


def measure_all(
    points: Sequence[tuple[str, Shape]],
    sides: Sequence[str],
    conditions: Conditions,
    repeats: int,
    report: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One dict per measurement. A shape that lies in both sweeps is measured once; the largest shapes come last."""
    rows = []
    by_size: dict[Shape, None] = dict.fromkeys(
        shape for _, shape in sorted(points, key=lambda point: point[1].length * point[1].stream_length)
    )
    for shape in by_size:
        for repeat in range(repeats):
            for side in sides:
                reading = in_child(
                    "measure",
                    side=side,
                    shape=dataclasses.asdict(shape),
                    conditions=dataclasses.asdict(conditions),
                )
                rows.append(
                    {
                        "side": side,
                        "stream_length": shape.stream_length,
                        **dataclasses.asdict(shape),
                        "repeat": repeat,
                        "seconds": None,
                        "wall_seconds": None,
                        "peak_bytes": None,
                        "failure": "",
                        **reading,
                    }
                )
                report(progress_line(rows[-1]))
    return rows


def progress_line(row: dict[str, Any]) -> str:
    head = f"L={row['length']:<4} S={row['stream_length']:<3} {row['side']:<16}"
    if row["failure"]:
        return f"{head} {row['failure']}"
    return (
        f"{head} {row['seconds']:8.2f} s  {row['peak_bytes'] / MEBIBYTE:8.0f} MiB  ({row['wall_seconds']:.1f} s wall)"
    )


Summary = dict[tuple[int, int, str], tuple[float, float] | None]


def summarise(rows: Sequence[dict[str, Any]]) -> Summary:
    """(seconds, bytes) by (L, S, side); None where a repeat ran out of memory.

    Of the repeats, the shortest time, because whatever else the machine does can only add to it, and the median memory.
    """
    groups: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["length"], row["stream_length"], row["side"]), []).append(row)
    return {
        key: None
        if any(row["failure"] for row in group)
        else (min(r["seconds"] for r in group), statistics.median(r["peak_bytes"] for r in group))
        for key, group in groups.items()
    }


def sweep_table(
    quantity: int, points: Sequence[tuple[int, int]], sides: Sequence[str], summary: Summary, unit: float, form: str
) -> str:
    """One line per (L, S); a column per side, then engine sides over naive sides, and stages of replay over `engine`.

    Args:
        quantity: 0 for time, 1 for memory.
        unit: What the value is divided by.
        form: Format of a value, e.g. ".2f".
    """
    pairs = [(a, b) for b in sides if b.startswith("naive") for a in sides if a.startswith("engine")]
    pairs += [(a, "engine") for a in sides if "engine" in sides and a in STAGES and a != "engine"]
    rows = []
    for length, stream_length in points:
        values = {side: summary[length, stream_length, side] for side in sides}
        row = [f"{length}", f"{stream_length}"]
        for side in sides:
            value = values[side]
            row.append(OUT_OF_MEMORY if value is None else format(value[quantity] / unit, form))
        for a, b in pairs:
            top, bottom = values[a], values[b]
            row.append("-" if top is None or bottom is None else f"{top[quantity] / bottom[quantity]:.2f}")
        rows.append(row)
    return markdown_table(["L", "S", *sides, *[f"{a} / {b}" for a, b in pairs]], rows)


def growth_table(axis: str, points: Sequence[tuple[int, int]], sides: Sequence[str], summary: Summary) -> str:
    """The exponent with which time and memory grow from the first to the last point: 1 is linear, 2 quadratic."""
    position = 0 if axis == "L" else 1
    first, last = points[0], points[-1]
    rows = []
    for side in sides:
        small, large = summary[(*first, side)], summary[(*last, side)]
        if small is None or large is None:
            rows.append([side, "-", "-"])
            continue
        factor = math.log(last[position] / first[position])
        rows.append([side, *[f"{math.log(large[k] / small[k]) / factor:.2f}" for k in (0, 1)]])
    return markdown_table(["side", f"time ~ {axis}^", f"peak memory ~ {axis}^"], rows)


def report_body(
    points: Sequence[tuple[str, Shape]],
    sides: Sequence[str],
    summary: Summary,
    conditions: Conditions,
    checked: dict[str, Any] | None,
) -> str:
    shape = points[0][1]
    on_cuda = conditions.device.startswith("cuda")
    time_name = "GPU seconds" if on_cuda else "CPU seconds (user + system, all threads)"
    memory_name = "MiB of GPU memory" if on_cuda else "MiB of resident set"
    parts = [
        "One forward and backward of the training step. "
        f"Mistral: hidden {shape.hidden}, {shape.layers} layers, {shape.heads}:{shape.kv_heads} heads, "
        f"intermediate {shape.intermediate}, V {shape.vocabulary}, {conditions.dtype}; B {shape.batch}, "
        f"K {shape.thoughts_per_position}, lookahead {shape.lookahead}; "
        f"S = thought tokens + {shape.lookahead + 1}. "
        "What the sides are is said at the top of `benchmarks/train_step.py`."
    ]
    for axis, meaning in (("L", "Text length L"), ("S", "Stream length S")):
        on_axis = [(s.length, s.stream_length) for name, s in points if name == axis]
        if not on_axis:
            continue
        parts += [
            f"## {meaning}",
            f"{time_name}:",
            sweep_table(0, on_axis, sides, summary, 1, ".2f"),
            f"Peak, {memory_name} above the built model:",
            sweep_table(1, on_axis, sides, summary, MEBIBYTE, ".0f"),
        ]
        if len(on_axis) > 1:
            parts += [
                "Growth exponent between the first and the last line:",
                growth_table(axis, on_axis, sides, summary),
            ]
    if checked is not None:
        parts += [
            "## Same thoughts, same step",
            f"All sides given the same thoughts, against {checked['rows'][0]['side']}:",
            check_table(checked),
        ]
    return "\n\n".join(parts)


def check_table(checked: dict[str, Any]) -> str:
    return markdown_table(
        ["objective", "side", "loss", "relative loss difference", "largest relative gradient difference"],
        [
            [
                row["objective"],
                row["side"],
                f"{row['loss']:.6f}",
                f"{row['loss_difference']:.1e}",
                f"{row['worst_gradient_difference']:.1e}",
            ]
            for row in checked["rows"]
        ],
        text_columns=2,
    )


def parser() -> Benchmark:
    p = Benchmark(__file__, __doc__, WithDefaults)
    sweep = p.add_argument_group("sweeps")
    sweep.add_argument("--lengths", type=int, nargs="*", default=[64, 128, 256, 512], help="text lengths L")
    sweep.add_argument("--stream-lengths", type=int, nargs="*", default=[8, 16, 32], help="stream lengths S")
    sweep.add_argument("--stream-sweep-length", type=int, default=128, help="L in the sweep over S")
    sweep.add_argument("--thought-length", type=int, default=9, help="thought tokens in the sweep over L")
    sweep.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="what to measure")
    sweep.add_argument(
        "--repeats", type=int, default=1, help="of each point; the tables show least time, median memory"
    )
    sweep.add_argument("--no-check", action="store_true", help="skip the check that all sides compute the same step")
    sweep.add_argument("--check-length", type=int, default=24, help="L of that check")
    model = p.add_argument_group("model and step")
    model.add_argument("--hidden", type=int, default=256, help="hidden size E")
    model.add_argument("--layers", type=int, default=4, help="decoder layers")
    model.add_argument("--heads", type=int, default=8, help="query heads H")
    model.add_argument("--kv-heads", type=int, default=2, help="key/value heads Hkv")
    model.add_argument("--intermediate", type=int, default=688, help="MLP width")
    model.add_argument("--vocabulary", type=int, default=4096, help="vocabulary V")
    model.add_argument("--batch", type=int, default=4, help="texts B")
    model.add_argument("--thoughts", type=int, default=2, help="thoughts per position K")
    model.add_argument("--lookahead", type=int, default=4, help="true tokens a thought is trained on")
    where = p.add_argument_group("conditions")
    where.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    where.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of parameters and states")
    where.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of torch")
    where.add_argument("--seed", type=int, default=0, help="of model, text and thoughts")
    where.add_argument("--output-dir", type=Path, default=RESULTS, help="for the two files")
    where.add_argument("--name", default="train_step", help="of the CSV and the Markdown file in it")
    where.add_argument("--child", help=argparse.SUPPRESS)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    benchmark = parser()
    options = benchmark.begin(argv)
    if options.child is not None:
        child_main(options.child)
        return
    conditions = Conditions(options.device, options.dtype, options.threads, options.seed)
    points = sweep_points(options)
    if not points:
        raise SystemExit("error: --lengths and --stream-lengths are both empty, nothing to measure")

    checked = None
    if not options.no_check:
        shape = dataclasses.replace(points[0][1], length=options.check_length)
        checked = in_child(
            "check",
            sides=options.sides,
            shape=dataclasses.asdict(shape),
            conditions=dataclasses.asdict(dataclasses.replace(conditions, dtype="float32")),
        )
        if "failure" in checked:
            raise SystemExit(f"error: {checked['failure']} in the check at L = {options.check_length}")
        print(check_table(checked), "\n", flush=True)
        limit = 1e-3
        for row in checked["rows"]:
            if not max(row["loss_difference"], row["worst_gradient_difference"]) <= limit:
                raise SystemExit(f"error: the sides do not compute the same step, so nothing is compared: {row}")

    rows = measure_all(points, options.sides, conditions, options.repeats, lambda line: print(line, flush=True))
    body = report_body(points, options.sides, summarise(rows), conditions, checked)
    benchmark.write(options.output_dir / options.name, "Training step: engine against naive", body, rows)


if __name__ == "__main__":
    main()
