"""The kernel benchmarks' meter: repetitions, failures that cost no other row, targets, the files that are written."""

from __future__ import annotations

import csv
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_timing
from benchmarks.gpu_timing import (
    Ceilings,
    KernelBenchmark,
    Measurement,
    Meter,
    NotTried,
    Session,
    Target,
    Timing,
    card,
    importable_from,
    quantile,
    relative_error,
    targets_table,
    times_faster,
    worst_error,
)
from benchmarks.train_step import MEBIBYTE, OUT_OF_MEMORY

CPU = torch.device("cpu")


def session(meter: Meter | None = None) -> Session:
    return Session(meter or Meter(CPU, 0.001, 1, 3), Ceilings(1.0, 100.0, torch.float32), ours=("torch",))


def row(side: str, work: str = "forward", seconds: float | None = None, **point: int) -> Measurement:
    timing = None if seconds is None else Timing(seconds, seconds, seconds, 1)
    return Measurement(point or {"N": 1}, work, side, flops=2e9, moved=1e6, timing=timing, peak_bytes=MEBIBYTE)


def test_quantiles_lie_between_neighbours() -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0, 5.0], 0.5) == 3.0
    assert quantile([1.0, 2.0], 0.25) == 1.25
    assert quantile([7.0], 0.8) == 7.0


@pytest.mark.parametrize(("seconds", "count"), [(1e-9, 1), (1e9, 7)], ids=["too_slow_to_repeat", "fast"])
def test_repetitions_follow_from_the_time_there_is(seconds: float, count: int) -> None:
    calls = []
    timing = Meter(CPU, seconds, least=5, most=7).time(lambda: calls.append(0))
    assert (timing.repetitions, len(calls)) == (count, count + 1)
    assert 0 <= timing.low <= timing.median <= timing.high


def test_peak_memory_is_what_a_call_takes_above_what_was_there() -> None:
    before = torch.ones(64 * MEBIBYTE, dtype=torch.uint8)
    found = Meter(CPU).peak_bytes(lambda: torch.ones(32 * MEBIBYTE, dtype=torch.uint8))
    assert 30 * MEBIBYTE < found < 50 * MEBIBYTE
    assert before[0] == 1


class _Event:
    """A CUDA event that remembers when it was recorded, in steps of one."""

    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        _Event.clock += 1
        self.at = _Event.clock

    def elapsed_time(self, other: _Event) -> float:
        return other.at - self.at


class _PretendedGPU(Meter):
    on_gpu = True


def test_the_cache_is_flushed_outside_of_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(gpu_timing, "FLUSHED_BYTES", 8)
    order = []
    zero = torch.Tensor.zero_
    monkeypatch.setattr(torch.Tensor, "zero_", lambda x: order.append("flush") or zero(x))
    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: waits.append(cycles) or order.append("wait"))
    monkeypatch.setattr(_Event, "record", lambda self, record=_Event.record: order.append("event") or record(self))
    timing = _PretendedGPU(CPU, 1.0, 3, 3).time(lambda: time.sleep(0.002) or order.append("call"))
    assert order == ["call", *["flush", "wait", "event", "call", "event"] * 3]
    assert all(0.004 * 1e9 < cycles <= 0.01 * 2e9 for cycles in waits)  # at 1 to 2 GHz longer than the host's 2 ms
    assert timing.median == 1e-3  # events are a millisecond apart


@pytest.mark.parametrize(
    ("raised", "failure", "note"),
    [
        (torch.cuda.OutOfMemoryError("CUDA"), OUT_OF_MEMORY, ""),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), OUT_OF_MEMORY, ""),
        (ModuleNotFoundError("No module named 'liger_kernel'"), "not installed", "No module named 'liger_kernel'"),
        (NotTried("its mask has 8 GiB"), "not tried", "its mask has 8 GiB"),
        (ValueError("a | b\nc"), "failed", "ValueError: a / b c"),
    ],
    ids=["gpu_memory", "cpu_memory", "package", "mask", "other"],
)
def test_a_side_that_fails_is_a_row(
    raised: Exception, failure: str, note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = session()

    def fail() -> Callable[[], object]:
        raise raised

    measured.measure(row("liger"), fail)
    good = measured.measure(row("torch"), lambda: lambda: None)
    assert (measured.rows[0].failure, measured.rows[0].note, measured.rows[0].timing) == (failure, note, None)
    assert good.timing is not None
    assert measured.failures_of_ours() == []
    assert failure in measured.table("torch")
    assert failure in capsys.readouterr().out


@pytest.mark.parametrize("error", [0.2, math.nan])
def test_a_wrong_result_is_reported_and_not_timed(error: float) -> None:
    measured = session()
    measured.measure(row("torch"), lambda: lambda: None, lambda _: error, limit=0.1)
    (wrong,) = measured.rows
    assert wrong.failure == "wrong result" and wrong.timing is None
    assert measured.failures_of_ours() == [wrong]


def test_errors_are_relative_and_nan_is_never_the_smaller_one() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    found = {"a": torch.tensor([math.nan, 1.0]), "b": expected}
    assert math.isnan(worst_error(found, {"a": expected, "b": expected}))


def test_table_and_rows_show_rates_shares_and_ratios() -> None:
    measured = session()
    measured.rows = [row("torch", seconds=0.004), row("reference", seconds=0.01)]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in measured.table("torch").splitlines()]
    assert lines[0][:9] == ["N", "work", "side", "ms", "20-80 %", "TFLOP/s", "GB/s", "of roofline", "peak MiB"]
    assert lines[2][3:10] == ["4", "4-4", "0.5", "0.25", "50 %", "1", "1.00"]
    assert lines[3][9] == "2.50"
    first, second = measured.csv_rows("torch")
    assert (first["of_product"], first["of_copy"], second["ratio"]) == ("0.5", "0.0025", "2.5")


def test_a_ratio_takes_the_fastest_of_a_side_at_the_same_point() -> None:
    measured = session()
    measured.rows = [
        row("triton", seconds=0.002, N=1),
        row("flex, 64x64", seconds=0.003, N=1),
        row("flex, 128x64", seconds=0.005, N=1),
        row("flex, 64x64", seconds=0.001, N=2),
        row("flex, default", "backward", seconds=0.001, N=1),
    ]
    ours, best = (measured.find({"N": 1}, "forward", side) for side in ("triton", "flex"))
    assert best is measured.rows[1]
    assert times_faster(ours, best) == 1.5
    assert times_faster(ours, measured.find({"N": 1}, "forward", "parts")) is None


@pytest.mark.parametrize(
    ("faster", "measured", "verdict"),
    [
        (False, None, "not measured"),
        (False, 0.2, "stretch met"),
        (False, 0.25, "met"),
        (False, 0.31, "missed"),
        (True, 1.0, "stretch met"),
        (True, 0.31, "stretch met"),
        (True, 0.1, "missed"),
    ],
)
def test_verdicts(faster: bool, measured: float | None, verdict: str) -> None:
    must, stretch = (0.2, 0.3) if faster else (0.3, 0.23)
    assert Target("forward", must, stretch, faster, measured).verdict == verdict


def test_targets_say_whose_they_are() -> None:
    targets = [Target("forward", 0.3, None, False, 0.4)]
    assert "measured is the cpu" in targets_table(targets, "cpu")
    assert "measured is" not in targets_table(targets, "h200")


def test_names_of_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    assert card(CPU) == "cpu"
    for name, expected in (("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100sxm480gb")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert card(torch.device("cuda", 0)) == expected


def test_packages_can_be_imported_from_a_folder_for_a_while(tmp_path: Path) -> None:
    (tmp_path / "a_comparator.py").write_text("VALUE = 3\n")
    with importable_from(tmp_path):
        import a_comparator

        assert a_comparator.VALUE == 3
    assert str(tmp_path) not in sys.path
    with pytest.raises(SystemExit, match="no such folder"), importable_from(tmp_path / "missing"):
        pass


def test_files_are_written_before_a_failure_of_ours_ends_the_run(tmp_path: Path) -> None:
    measured = session()
    measured.rows = [row("torch", seconds=0.004), row("torch", "backward")]
    measured.rows[1].failure = "wrong result"
    benchmark = KernelBenchmark("attention.py", None, ["torch"])
    options = benchmark.begin(["--quick", "--device", "cpu", "--sides", "torch", "--output-dir", str(tmp_path)])
    results = benchmark.kernel_results(measured, options, "Attention", "Text.", lambda session: [])
    with pytest.raises(SystemExit, match=r"torch, backward.*wrong result"), results:
        pass
    lines = (tmp_path / "attention_cpu.csv").read_text().splitlines()
    assert lines[0].startswith("# command: python benchmarks/attention.py --quick --device cpu")
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [found["failure"] for found in rows] == ["", "wrong result"]
    assert "# Attention\n\nText.\n\n| N " in (tmp_path / "attention_cpu.md").read_text()


def test_what_was_measured_before_a_cut_is_written(tmp_path: Path) -> None:
    """A machine that is lent for minutes may go at any second: each row is on the disk before the next begins."""
    measured = session()
    benchmark = KernelBenchmark("attention.py", None, ["torch"])
    options = benchmark.begin(["--quick", "--device", "cpu", "--sides", "torch", "--output-dir", str(tmp_path)])
    results = benchmark.kernel_results(measured, options, "Attention", "Text.", lambda session: [])
    with pytest.raises(KeyboardInterrupt), results:
        measured.measure(row("torch"), lambda: lambda: None)
        raise KeyboardInterrupt
    text = (tmp_path / "attention_cpu.md").read_text()
    assert "Stopped before the end" in text and "Text.\n\n| N " in text
    lines = (tmp_path / "attention_cpu.csv").read_text().splitlines()
    (found,) = csv.DictReader(line for line in lines if not line.startswith("#"))
    assert (found["N"], found["side"]) == ("1", "torch")
    assert {path.name for path in tmp_path.iterdir()} == {"attention_cpu.md", "attention_cpu.csv"}
