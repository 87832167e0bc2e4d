"""The benchmark of the DPO step compares equal steps, and its tables say what was measured."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest

from benchmarks.dpo_step import Shape, in_child, main, results_table, texts
from benchmarks.train_step import MEBIBYTE, OUT_OF_MEMORY, Conditions

SHAPE = Shape(pairs=2, prompt=3, completion=8, hidden=16, layers=1, heads=2, intermediate=24, vocabulary=40)
CONDITIONS = dataclasses.asdict(Conditions("cpu", "float32", 1, 0))


def test_pairs_have_the_lengths_that_were_asked_for() -> None:
    pairs = texts(dataclasses.replace(SHAPE, pairs=20, completion=64), seed=0)
    lengths = [len(pair[which].split()) for pair in pairs for which in ("chosen", "rejected")]
    assert lengths[:2] == [63, 63] and min(lengths) >= 31 and max(lengths) == 63  # the end of the sequence follows
    assert {len(pair["prompt"].split()) for pair in pairs} == {3}


def test_the_table_shows_least_time_median_memory_and_failures() -> None:
    def row(side: str, seconds: float | None, size: float, failure: str = "") -> dict[str, object]:
        return {"side": side, "seconds": seconds, "peak_bytes": size * MEBIBYTE, "failure": failure}

    rows = [row("engine", 2.0, 5), row("engine", 1.5, 9), row("engine", 3.0, 6), row("trl", None, 0, OUT_OF_MEMORY)]
    lines = results_table(rows, ["engine", "trl"]).splitlines()[2:]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines] == [
        ["engine", "1.50", "6"],
        ["trl", "-", OUT_OF_MEMORY],
    ]


@pytest.mark.slow
def test_the_step_is_that_of_trl() -> None:
    pytest.importorskip("trl")
    checked = in_child("check", sides=["engine", "trl"], shape=dataclasses.asdict(SHAPE), conditions=CONDITIONS)
    assert [row["side"] for row in checked["rows"]] == ["engine", "trl"]
    assert all(row["loss_difference"] < 1e-5 and row["worst_gradient_difference"] < 1e-4 for row in checked["rows"])


@pytest.mark.slow
def test_results_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command refuses to compare sides that differ, so that it ends is a check of both ways."""
    sizes = [f"--{name}={value}" for name, value in dataclasses.asdict(SHAPE).items()]
    out = tmp_path / "dpo_step.md"
    main([*sizes, "--threads", "1", "--sides", "engine", "logits", "--out", str(out)])
    printed = capsys.readouterr().out
    rows = list(csv.DictReader(line for line in out.with_suffix(".csv").read_text().splitlines() if line[0] != "#"))
    assert [row["side"] for row in rows] == ["engine", "logits"]
    assert all(float(row["seconds"]) > 0 and int(row["peak_bytes"]) >= 0 and not row["failure"] for row in rows)
    table = next(line for line in out.read_text().splitlines() if line.startswith("| engine "))
    assert table in printed
