"""The step benchmark measures what it says: its meter, its arithmetic, its failures, and one small run of it all."""

from __future__ import annotations

import csv
import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.train_step import (
    MEBIBYTE,
    OUT_OF_MEMORY,
    Conditions,
    PeakResidentSet,
    Shape,
    answer_of,
    growth_table,
    in_child,
    main,
    parser,
    summarise,
    sweep_points,
    sweep_table,
)

TINY = [
    *("--hidden", "16", "--layers", "1", "--heads", "2", "--kv-heads", "1", "--intermediate", "24"),
    *("--vocabulary", "32", "--batch", "1", "--thought-length", "2", "--lookahead", "2", "--threads", "1"),
]


def test_peak_resident_set_sees_memory_that_is_gone_again() -> None:
    size = 256 * MEBIBYTE
    with PeakResidentSet() as resident:
        block = bytearray(size)
        block[::4096] = b"x" * len(block[::4096])
        del block
    assert size <= resident.increase + 8 * MEBIBYTE
    assert resident.increase < 1.5 * size


def test_sampling_thread_agrees_where_the_high_water_mark_cannot_be_reset() -> None:
    size = 256 * MEBIBYTE
    with PeakResidentSet() as resident:
        resident._resettable = False
        block = bytearray(size)
        block[::4096] = b"x" * len(block[::4096])
        subprocess.run([sys.executable, "-c", "pass"], check=True)  # longer than the sampling interval
        del block
    assert 0.9 * size <= resident.increase < 1.5 * size


def test_sweeps_have_the_stream_length_that_was_asked_for() -> None:
    points = sweep_points(parser().parse_args(["--lengths", "64", "512", "--stream-lengths", "8", "32"]))
    assert [(axis, s.length, s.stream_length) for axis, s in points] == [
        ("L", 64, 14),
        ("L", 512, 14),
        ("S", 128, 8),
        ("S", 128, 32),
    ]


def test_a_stream_without_room_for_a_thought_is_refused() -> None:
    with pytest.raises(SystemExit, match="--stream-lengths 5"):
        sweep_points(parser().parse_args(["--stream-lengths", "5"]))


def test_tables_show_least_time_ratios_growth_and_failures() -> None:
    def row(length: int, side: str, seconds: float | None, size: int | None) -> dict[str, object]:
        failure = "" if seconds is not None else OUT_OF_MEMORY
        return {
            "length": length,
            "stream_length": 14,
            "side": side,
            "seconds": seconds,
            "peak_bytes": size,
            "failure": failure,
        }

    rows = [
        row(64, "naive", 4.0, 100),
        row(64, "naive", 9.0, 100),
        row(64, "engine", 2.0, 25),
        row(256, "naive", 64.0, 1600),
        row(256, "engine", 8.0, 100),
        row(512, "naive", None, None),
        row(512, "engine", 16.0, 200),
    ]
    sides = ["naive", "engine", "engine_all"]
    rows += [row(length, "engine_all", seconds, 100) for length, seconds in ((64, 1.0), (256, 6.0), (512, 12.0))]
    summary = summarise(rows)
    lines = sweep_table(0, [(64, 14), (256, 14), (512, 14)], sides, summary, 1, ".1f").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["L", "S", *sides, "engine / naive", "engine_all / naive", "engine_all / engine"]
    assert cells[2:] == [
        ["64", "14", "4.0", "2.0", "1.0", "0.50", "0.25", "0.50"],
        ["256", "14", "64.0", "8.0", "6.0", "0.12", "0.09", "0.75"],
        ["512", "14", OUT_OF_MEMORY, "16.0", "12.0", "-", "-", "0.75"],
    ]
    grown = growth_table("L", [(64, 14), (256, 14)], sides[:2], summary).splitlines()[2:]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in grown] == [
        ["naive", "2.00", "2.00"],
        ["engine", "1.00", "1.00"],
    ]


def test_running_out_of_memory_is_an_answer_and_any_other_failure_an_error() -> None:
    shape = Shape(16, 2, 2, 1, 2, 16, 1, 2, 1, 24, 32)
    too_large = dataclasses.asdict(dataclasses.replace(shape, vocabulary=10**14))
    conditions = dataclasses.asdict(Conditions("cpu", "float32", 1, 0))
    assert in_child("measure", side="naive", shape=too_large, conditions=conditions) == {"failure": OUT_OF_MEMORY}

    killed = subprocess.run(
        [sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"],
        capture_output=True,
        text=True,
    )
    assert answer_of(killed) == {"failure": OUT_OF_MEMORY}
    broken = subprocess.run([sys.executable, "-c", "raise KeyError('lost')"], capture_output=True, text=True)
    with pytest.raises(RuntimeError, match="lost"):
        answer_of(broken)


@pytest.mark.slow
def test_all_sides_compute_the_same_step_and_the_results_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command refuses to compare sides whose losses or gradients differ, so that it ends is itself the check."""
    sides = ["naive", "engine", "engine_down", "engine_mlp", "engine_linears", "engine_all", "engine_two_pass"]
    sweep = ["--lengths", "16", "--stream-lengths", "--check-length", "12", "--sides", *sides]
    main([*TINY, *sweep, "--output-dir", str(tmp_path)])
    printed = capsys.readouterr().out
    text = (tmp_path / "train_step.csv").read_text()
    assert "# command: python benchmarks/train_step.py" in text
    rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
    assert [row["side"] for row in rows] == sides
    assert all(float(row["seconds"]) > 0 and int(row["peak_bytes"]) >= 0 and not row["failure"] for row in rows)
    assert all((row["length"], row["stream_length"]) == ("16", "5") for row in rows)
    markdown = (tmp_path / "train_step.md").read_text()
    table = next(line for line in markdown.splitlines() if line.startswith("| 16 "))
    assert table in printed
