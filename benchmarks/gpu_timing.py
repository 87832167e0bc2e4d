"""How the kernel benchmarks measure, on a GPU and on a CPU: time, peak memory, ceilings, failures, tables, targets.

Time is the median of repetitions, each between two CUDA events and behind a write that flushes the L2 cache; on a CPU
it is CPU time, user and system, of all threads. The ceilings are measured in the same run: a large matrix product and a
large copy on the device. A side that runs out of memory, is not installed, or computes something else than the
reference, is a row that says so.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.environment import markdown_table
from benchmarks.script import RESULTS, Benchmark
from benchmarks.train_step import MEBIBYTE, OUT_OF_MEMORY, PeakResidentSet

NOT_INSTALLED = "not installed"
NOT_TRIED = "not tried"
WRONG = "wrong result"
CUT = "**Stopped before the end: only what was reached.**"
FAILED = "failed"
FLUSHED_BYTES = 2**30
"""Written before each repetition: many times any L2 cache."""
CYCLES_PER_SECOND = 2e9
LONGEST_WAIT = 0.01
"""Seconds that a device waits before a repetition, at most."""
Built = TypeVar("Built")
LARGEST_ERROR = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4, torch.float64: 1e-10}
"""Relative to the reference (norm of the difference over norm): a few times the rounding of the dtype's operands, far
below what a wrong mask or a missing term makes."""
NOMINAL_BF16 = {"h200": 989.4, "h100": 989.4, "a100": 312.0, "l40s": 362.0, "b200": 2250.0}
"""Dense bf16 TFLOP/s of the vendors' data sheets, by a part of the card's name."""


class NotTried(RuntimeError):
    """A side does not even start; the message says why, and becomes the row's."""


# ---------------------------------------------------------------------------------------------------------- the meter


@dataclass(frozen=True)
class Timing:
    """Seconds: the median and the 20 % and 80 % quantiles of `repetitions`."""

    median: float
    low: float
    high: float
    repetitions: int


@dataclass(frozen=True)
class Meter:
    """Measures on one device.

    Args:
        device: CPU or CUDA.
        seconds: what a measurement may take, repetitions, not flushes, counted; at least `least` repetitions are made.
        least: fewest repetitions; a call that takes longer than `seconds` by itself is repeated once.
        most: most repetitions.
    """

    device: torch.device
    seconds: float = 0.3
    least: int = 5
    most: int = 100

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def time(self, call: Callable[[], object]) -> Timing:
        """Median time of `call`, which has been executed before: a first execution compiles, loads and allocates."""
        self.synchronize()
        begin = time.perf_counter()
        call()
        host = time.perf_counter() - begin
        self.synchronize()
        estimate = time.perf_counter() - begin
        fitting = int(self.seconds / max(estimate, 1e-9))
        count = 1 if fitting == 0 else min(self.most, max(self.least, fitting))
        seconds = sorted(self._on_gpu(call, count, host) if self.on_gpu else self._on_cpu(call, count))
        return Timing(statistics.median(seconds), quantile(seconds, 0.2), quantile(seconds, 0.8), count)

    def _on_gpu(self, call: Callable[[], object], count: int, host: float) -> list[float]:
        """The device waits until the host has queued a repetition: the device is timed, not the launches."""
        wait = int(CYCLES_PER_SECOND * min(LONGEST_WAIT, 2 * host))
        flush = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=self.device)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for begin, end in events:
            flush.zero_()
            torch.cuda._sleep(wait)
            begin.record()
            call()
            end.record()
        self.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in events]

    def _on_cpu(self, call: Callable[[], object], count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            begin = time.process_time()
            call()
            seconds.append(time.process_time() - begin)
        return seconds

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Most memory in use during `call` above what was in use before, what it returns included."""
        if not self.on_gpu:
            with suppress(AttributeError):  # only glibc has it: else memory that earlier calls freed is reused unseen
                ctypes.CDLL(None).malloc_trim(0)
            with PeakResidentSet() as resident:
                kept = call()
            del kept
            return resident.increase
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        kept = call()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del kept
        return peak

    def built(self, call: Callable[[], Built]) -> tuple[Built, float]:
        """What `call` makes once for many layers, and the seconds, the host's included, of a second execution."""
        call()
        self.synchronize()
        begin = time.perf_counter()
        made = call()
        self.synchronize()
        return made, time.perf_counter() - begin

    def graph(self, call: Callable[[], object]) -> Callable[[], object]:
        """`call` as a CUDA graph that has been captured; on a CPU `call` itself.

        Raises:
            RuntimeError: `call` copies between host and device, or does something else that no graph can hold.
        """
        if not self.on_gpu:
            return call
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()

        def replay() -> object:
            graph.replay()
            return kept

        return replay


def quantile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation between the neighbours."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in this run: matrix product in TFLOP/s, copy in GB/s, bytes read plus bytes written."""

    teraflops: float
    gigabytes: float
    dtype: torch.dtype

    @staticmethod
    def measure(meter: Meter, dtype: torch.dtype) -> Ceilings:
        size = 8192 if meter.on_gpu else 512
        # random: a product of zeros draws less power and runs faster
        left, right = torch.randn(2, size, size, device=meter.device).to(dtype)

        def multiply() -> Tensor:
            return left @ right

        multiply()
        product = meter.time(multiply).median
        count = (2**32 if meter.on_gpu else 2**26) // left.element_size()
        source = torch.randn(count // 64, device=meter.device).to(dtype).repeat(64)
        target = source.clone()
        copy = meter.time(lambda: target.copy_(source)).median
        copied = 2 * source.numel() * source.element_size()
        return Ceilings(2 * size**3 / product / 1e12, copied / copy / 1e9, dtype)

    def floor(self, flops: float, moved: float) -> float:
        """Seconds below which no version can be: the larger of the two times."""
        return max(flops / (self.teraflops * 1e12), moved / (self.gigabytes * 1e9))

    def facts(self) -> dict[str, str]:
        return {
            "measured matrix product": f"{self.teraflops:.3g} TFLOP/s, {dtype_name(self.dtype)}",
            "measured copy": f"{self.gigabytes:.4g} GB/s, read and written",
        }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------- measurements


@dataclass
class Measurement:
    """A row: one side doing one thing at one point.

    Args:
        point: what identifies the problem, by column.
        work: what is done, such as "forward".
        side: who does it.
        flops: operations of the useful work.
        moved: fewest bytes that the work moves, each input read once and each output written once.
        error: largest relative difference from the reference over the checked tensors.
        failure: why there is no time, in a word or two, or empty.
        note: anything else that the reader must know.
    """

    point: dict[str, Any]
    work: str
    side: str
    flops: float
    moved: float
    timing: Timing | None = None
    peak_bytes: int | None = None
    error: float | None = None
    failure: str = ""
    note: str = ""

    @property
    def seconds(self) -> float | None:
        return None if self.timing is None else self.timing.median

    def key(self) -> tuple[object, ...]:
        return (*self.point.values(), self.work)


@dataclass
class Session:
    """Measures side after side and keeps the rows; prints each as it comes.

    Args:
        meter: of the device.
        ceilings: of the device.
        ours: sides whose failure is an error of the whole run.
        save: writes the rows so far; called after each.
    """

    meter: Meter
    ceilings: Ceilings
    ours: tuple[str, ...]
    rows: list[Measurement] = field(default_factory=list)
    save: Callable[[], None] = lambda: None

    def measure(
        self,
        row: Measurement,
        prepare: Callable[[], Callable[[], object]],
        check: Callable[[object], float] | None = None,
        limit: float = math.inf,
        graph: bool = False,
    ) -> Measurement:
        """Fill a row: run once and compare, then take memory and time.

        Args:
            row: without its measurements.
            prepare: returns what is timed.
            check: from what one execution returns to its relative error.
            limit: the largest error with which a side is timed.
            graph: on a GPU, time the replay of a CUDA graph.
        """
        self.rows.append(row)
        with self._failures(row):
            call = prepare()
            if check is not None:
                row.error = check(call())
                if not row.error <= limit:  # NaN is above every limit
                    row.failure = WRONG
            if not row.failure:
                row.peak_bytes = self.meter.peak_bytes(call)
                row.timing = self.meter.time(self.meter.graph(call) if graph else call)
        self.release()
        print(self.progress_line(row), flush=True)
        self.save()
        return row

    def release(self) -> None:
        """Give the memory of the last side back, that of tensors in reference cycles too."""
        if self.meter.on_gpu:
            import gc

            gc.collect()
            torch.cuda.empty_cache()

    @contextmanager
    def _failures(self, row: Measurement) -> Iterator[None]:
        """Turns every exception into the row's failure: one side must not cost the others their time on a GPU."""
        try:
            yield
        except (torch.cuda.OutOfMemoryError, MemoryError):
            row.failure = OUT_OF_MEMORY
        except ModuleNotFoundError as error:
            row.failure = NOT_INSTALLED
            row.note = str(error)
        except NotTried as error:
            row.failure, row.note = NOT_TRIED, str(error)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if "out of memory" in text.lower() or "can't allocate memory" in text:
                row.failure = OUT_OF_MEMORY
            else:
                row.failure, row.note = FAILED, " ".join(text.replace("|", "/").split())[:160]
                traceback.print_exc()

    def progress_line(self, row: Measurement) -> str:
        head = " ".join(f"{name}={value}" for name, value in row.point.items()) + f" {row.work:<20} {row.side:<34}"
        if row.timing is None:
            return f"{head} {row.failure} {row.note}"
        error = "" if row.error is None else f"  error {row.error:.1e}"
        return f"{head} {1000 * row.timing.median:10.4f} ms{error}"

    def find(self, point: dict[str, Any], work: str, side: str, exact: bool = False) -> Measurement | None:
        """The fastest row of a side, its variants included unless `exact`, at a point that agrees with `point`."""
        found = [
            row
            for row in self.rows
            if row.work == work
            and (row.side == side or (not exact and row.side.startswith(f"{side}, ")))
            and row.timing is not None
            and all(row.point.get(name) == value for name, value in point.items())
        ]
        return min(found, key=lambda row: row.seconds or math.inf, default=None)

    def failures_of_ours(self) -> list[Measurement]:
        return [row for row in self.rows if row.side in self.ours and row.failure]

    def table(self, ours: str) -> str:
        """The rows as Markdown; `ours` is the side that the others are compared with."""
        columns = [*self.rows[0].point, "work", "side", "ms", "20-80 %", "TFLOP/s", "GB/s", "of roofline", "peak MiB"]
        columns += [f"/ {ours}", "error", "note"]
        lines, base = [], {row.key(): row.seconds for row in self.rows if row.side == ours}
        for row in self.rows:
            head = [*map(str, row.point.values()), row.work, row.side]
            error = "-" if row.error is None else f"{row.error:.0e}"
            if row.timing is None:
                lines.append([*head, row.failure, *["-"] * 6, error, row.note])
                continue
            derived = self.derived(row, base.get(row.key()))
            lines.append(
                [
                    *head,
                    f"{derived['ms']:.4g}",
                    f"{derived['ms_20']:.4g}-{derived['ms_80']:.4g}",
                    f"{derived['tflops']:.4g}",
                    f"{derived['gb_per_s']:.4g}",
                    f"{100 * derived['of_roofline']:.3g} %",
                    f"{(row.peak_bytes or 0) / MEBIBYTE:.4g}",
                    "-" if derived["ratio"] is None else f"{derived['ratio']:.2f}",
                    error,
                    row.note,
                ]
            )
        return markdown_table(columns, lines, text_columns=len(self.rows[0].point) + 2)

    def derived(self, row: Measurement, ours: float | None) -> dict[str, Any]:
        """What follows from the measured numbers of a row that has a time."""
        assert row.timing is not None
        seconds = row.timing.median
        return {
            "ms": 1000 * seconds,
            "ms_20": 1000 * row.timing.low,
            "ms_80": 1000 * row.timing.high,
            "tflops": row.flops / seconds / 1e12,
            "of_product": row.flops / seconds / 1e12 / self.ceilings.teraflops,
            "gb_per_s": row.moved / seconds / 1e9,
            "of_copy": row.moved / seconds / 1e9 / self.ceilings.gigabytes,
            "of_roofline": self.ceilings.floor(row.flops, row.moved) / seconds,
            "ratio": None if ours is None else seconds / ours,
        }

    def csv_rows(self, ours: str) -> list[dict[str, object]]:
        base = {row.key(): row.seconds for row in self.rows if row.side == ours}
        empty = dict.fromkeys(
            ("ms", "ms_20", "ms_80", "tflops", "of_product", "gb_per_s", "of_copy", "of_roofline", "ratio")
        )
        return [
            {
                **row.point,
                "work": row.work,
                "side": row.side,
                **{
                    name: value if value is None else f"{value:.6g}"
                    for name, value in (empty if row.timing is None else self.derived(row, base.get(row.key()))).items()
                },
                "repetitions": None if row.timing is None else row.timing.repetitions,
                "peak_bytes": row.peak_bytes,
                "useful_flops": f"{row.flops:.6g}",
                "least_bytes": f"{row.moved:.6g}",
                "relative_error": None if row.error is None else f"{row.error:.3g}",
                "failure": row.failure,
                "note": row.note,
            }
            for row in self.rows
        ]


# ------------------------------------------------------------------------------------------------------------ targets


@dataclass(frozen=True)
class Target:
    """A number to reach on an H200: a time in milliseconds (at most), or how many times faster we are (at least)."""

    name: str
    must: float
    stretch: float | None
    times_faster: bool
    measured: float | None

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"

        def reached(wanted: float) -> bool:
            measured = self.measured or 0.0
            return measured >= wanted if self.times_faster else measured <= wanted

        if self.stretch is not None and reached(self.stretch):
            return "stretch met"
        return "met" if reached(self.must) else "missed"


def milliseconds(row: Measurement | None) -> float | None:
    return None if row is None or row.seconds is None else 1000 * row.seconds


def times_faster(ours: Measurement | None, other: Measurement | None) -> float | None:
    """How many times `ours` goes into the other's time."""
    if ours is None or other is None or not ours.seconds or other.seconds is None:
        return None
    return other.seconds / ours.seconds


def targets_table(targets: Sequence[Target], card: str) -> str:
    def show(target: Target, value: float | None) -> str:
        return "-" if value is None else f"{value:.3g} {'x' if target.times_faster else 'ms'}"

    lines = [
        [
            target.name,
            *(show(target, value) for value in (target.must, target.stretch, target.measured)),
            target.verdict,
        ]
        for target in targets
    ]
    where = "" if card == "h200" else f" The targets are an H200's; measured is the {card}."
    table = markdown_table(["target", "must", "stretch", "measured", ""], lines)
    return f"Times at most, ratios at least.{where}\n\n{table}"


# --------------------------------------------------------------------------------------------------------- the script


class KernelBenchmark(Benchmark):
    """The command line of a kernel benchmark: the options that all of them share.

    Args:
        file: See `Benchmark`.
        about: See `Benchmark`.
        sides: What can be measured.
        dtypes: That it can be measured in.
    """

    def __init__(
        self,
        file: str,
        about: str | None,
        sides: Sequence[str],
        dtypes: Sequence[str] = ("bfloat16", "float16", "float32"),
    ) -> None:
        super().__init__(file, about)
        where = self.add_argument_group("conditions")
        where.add_argument("--dtype", choices=dtypes, help="default: bfloat16, CPU float32")
        where.add_argument("--device", default="auto", help="cpu, cuda or cuda:N; auto: the GPU where there is one")
        where.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's)")
        where.add_argument("--seed", type=int, default=0, help="of the random inputs")
        where.add_argument("--seconds", type=float, help="of repetitions for each measurement")
        where.add_argument("--sides", nargs="+", choices=sides, help="what to measure (default: all that fit it)")
        self.add_quick()
        where.add_argument("--output-dir", type=Path, default=RESULTS, help="for the two files")

    def begin(self, arguments: Sequence[str] | None = None, threads: int | None = None) -> argparse.Namespace:
        """As of every benchmark; also settles the device and its dtype (`options.device`, `.on_gpu`, `.dtype`)."""
        options = super().begin(arguments, threads)
        torch.manual_seed(options.seed)
        options.device = resolve_device(options.device)
        options.on_gpu = options.device.type == "cuda"
        options.dtype = getattr(torch, options.dtype or ("bfloat16" if options.on_gpu else "float32"))
        self.device = str(options.device)
        return options

    def start(
        self, options: argparse.Namespace, ours: tuple[str, ...], seconds_on_gpu: float = 0.3, least: int = 5
    ) -> Session:
        """Measures the device's ceilings; see `Meter` and `Session`."""
        seconds = options.seconds if options.seconds is not None else (seconds_on_gpu if options.on_gpu else 0.1)
        meter = Meter(options.device, 0.01, 1, 2) if options.quick else Meter(options.device, seconds, least)
        if meter.on_gpu:
            torch.cuda.set_device(options.device)
        session = Session(meter, Ceilings.measure(meter, options.dtype), ours)
        self.facts |= session.ceilings.facts()
        print("; ".join(f"{name}: {value}" for name, value in session.ceilings.facts().items()), flush=True)
        return session

    @contextmanager
    def results(
        self,
        session: Session,
        options: argparse.Namespace,
        title: str,
        body: Callable[[], str],
        rows: Callable[[], Sequence[Mapping[str, object]]],
    ) -> Iterator[None]:
        """Writes both files, named after the script and the card, after each row that is measured within, and at last.

        Args:
            session: In which it is measured.
            options: Of the command line.
            title: Of the Markdown file.
            body: Returns its text from what the session has.
            rows: Returns the rows of the CSV file.

        Raises:
            SystemExit: A side of ours has failed.
        """
        path = options.output_dir / f"{Path(self.path).stem}_{card(session.meter.device)}"
        session.save = lambda: self.save(path, title, f"{CUT}\n\n{body()}", rows())
        yield
        self.write(path, title, body(), rows())
        failed = session.failures_of_ours()
        if failed:
            raise SystemExit(
                "error: "
                + "; ".join(f"{row.side}, {row.work}, {row.point}: {row.failure} {row.note}" for row in failed)
            )

    def kernel_results(
        self,
        session: Session,
        options: argparse.Namespace,
        title: str,
        introduction: str,
        targets: Callable[[Session], Sequence[Target]],
    ) -> AbstractContextManager[None]:
        """`results` with the table of all rows, below what the reader must know of it, and that of the targets."""
        ours = "triton" if "triton" in options.sides else "torch"

        def body() -> str:
            reached = targets_table(targets(session), card(session.meter.device))
            return "\n\n".join([introduction, session.table(ours), "## Targets", reached])

        return self.results(session, options, title, body, lambda: session.csv_rows(ours))


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    return (
        torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device
    )


def card(device: torch.device) -> str:
    """A name for files: `h200` of an NVIDIA H200, `cpu` of every CPU."""
    if device.type != "cuda":
        return "cpu"
    words = torch.cuda.get_device_name(device).lower().replace("nvidia", "").replace("amd", "").split()
    return "_".join("".join(c for c in word if c.isalnum()) for word in words)


@contextmanager
def importable_from(folder: Path | None) -> Iterator[None]:
    """Within the block, packages in `folder` can be imported: for machines where nothing can be installed."""
    if folder is None:
        yield
        return
    if not folder.is_dir():
        raise SystemExit(f"error: --comparators {folder}: no such folder")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; NaN where anything is NaN."""
    difference = (found.detach().to(expected.dtype) - expected).norm()
    return float(difference / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny))


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error over tensors with these names, NaN if one is."""
    errors = [relative_error(found[name], tensor) for name, tensor in expected.items()]
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)
