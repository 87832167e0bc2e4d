"""The head's benchmark: its comparators compute the same loss and gradients, and one small run of it all."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import mixed_cross_entropy
from benchmarks.gpu_timing import relative_error
from benchmarks.mixed_cross_entropy import LOSSES, MODELS, ON_GPU_ONLY, SIDES, Problem, Shape, main

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def problem(loss: str) -> Problem:
    torch.manual_seed(0)
    return Problem(Shape(loss, "tiny", rows=12, vocabulary=50, hidden=16), torch.float32, CPU)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_expected_gradients_are_those_of_the_mean_loss(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = problem(loss)
    leaves = made.leaves()
    state = leaves[0] if loss == "linear" else torch.lerp(leaves[0], leaves[1], leaves[2].unsqueeze(-1))
    mean = F.cross_entropy(state @ leaves[-1].T, made.target)
    mean.backward()
    monkeypatch.setattr(mixed_cross_entropy, "REFERENCE_LOGITS", 5 * 50)  # in chunks of five rows
    assert relative_error(made.expected["loss"], mean.detach()) < 1e-6
    for x, expected in zip(leaves, made.expected["grads"], strict=True):
        assert x.grad is not None
        assert relative_error(expected, x.grad) < 1e-5


def test_the_target_stands_out_as_after_training() -> None:
    shape = Shape("mixed", "tiny", rows=64, vocabulary=1000, hidden=64)
    assert 0.2 < float(Problem(shape, torch.float32, CPU).expected["loss"]) < 5.0


def test_counts() -> None:
    shape = Shape("mixed", "tiny", rows=12, vocabulary=50, hidden=16)
    made = problem("mixed")
    tensors = sum(x.numel() * 4 for x in (*made.hidden, made.lm_head))
    assert shape.flops("forward") == 2 * 12 * 50 * 16 and shape.flops("both") == 6 * 12 * 50 * 16
    assert tensors < shape.least_bytes("forward", 4) < tensors + 17 * 12


def test_every_side_that_a_cpu_can_run_is_right_and_timed(tmp_path: Path) -> None:
    main(["--quick", "--device", "cpu", "--output-dir", str(tmp_path)])
    text = (tmp_path / "mixed_cross_entropy_cpu.csv").read_text()
    rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
    assert {row["side"] for row in rows} == set(SIDES) - set(ON_GPU_ONLY)
    for row in rows:
        if row["side"].startswith("F.linear") and not hasattr(F, "linear_cross_entropy"):
            assert row["failure"] == "not tried"
            continue
        assert not row["failure"] and float(row["ms"]) > 0 and float(row["relative_error"]) < 1e-4, row


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    main(["--quick", "--device", "cpu", "--sides", "torch", "cce", "--losses", "linear", "--output-dir", str(tmp_path)])
    table = (tmp_path / "mixed_cross_entropy_cpu.md").read_text()
    assert table.count("not installed |") == 2  # of both kinds of work
    assert "- cut-cross-entropy: `" in table


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="wants TRITON_INTERPRET=1")
def test_the_sides_of_a_gpu_run_interpreted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", {"vocabulary": 40, "hidden": 32})
    sides = ["triton", "triton, weights later", "torch"]
    main(["--quick", "--device", "cpu", "--sides", *sides, "--rows", "4", "--output-dir", str(tmp_path)])
    text = (tmp_path / "mixed_cross_entropy_cpu.csv").read_text()
    rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
    assert {row["side"] for row in rows} == set(sides)
    assert all(not row["failure"] and float(row["relative_error"]) < 1e-4 for row in rows)
