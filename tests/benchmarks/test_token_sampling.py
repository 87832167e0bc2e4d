"""The sampling benchmark sees a sampler that is wrong, and runs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import token_sampling
from benchmarks.token_sampling import LARGEST_DEVIATION, SIDES, deviation, main

pytestmark = pytest.mark.usefixtures("one_thread")

LOGITS = torch.tensor([3.0, 2.0, 2.0, 1.0, *[-1.0] * 96])


def test_deviation_is_small_for_the_distribution_and_large_for_another() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs = LOGITS.log_softmax(-1)
    found = [
        deviation(torch.multinomial(log_probs.exp(), 500, replacement=True, generator=generator), log_probs)
        for _ in range(200)
    ]
    assert max(found) < LARGEST_DEVIATION
    assert abs(sum(found) / len(found)) < 0.3  # standard deviations of a standard normal variable, nearly
    flatter = (LOGITS / 1.3).softmax(-1)
    assert deviation(torch.multinomial(flatter, 2000, replacement=True, generator=generator), log_probs) > 6
    assert deviation(torch.zeros(500, dtype=torch.int64), log_probs) > 6


def run(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    main(["--quick", "--device", "cpu", "--output-dir", str(tmp_path), *arguments])
    text = (tmp_path / "token_sampling_cpu.csv").read_text()
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


def test_every_side_that_a_cpu_can_run_is_right_and_timed(tmp_path: Path) -> None:
    rows = run(tmp_path)
    assert {row["side"] for row in rows} == set(SIDES) - {"triton"}
    assert {row["side"] for row in rows if row["work"] == "greedy"} == {"torch", "reference", "multinomial"}
    assert all(not row["failure"] and float(row["ms"]) > 0 and float(row["relative_error"]) < 1e-5 for row in rows)


def test_a_sampler_that_always_takes_the_best_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(hidden: Tensor, head: Tensor, _: bool, seed: int) -> tuple[Tensor, Tensor]:
        return SIDES["multinomial"](hidden, head, True, seed)

    monkeypatch.setitem(token_sampling.SIDES, "gumbel", greedy)
    rows = run(tmp_path, "--sides", "gumbel", "torch", "--rows", "512")
    failures = {(row["side"], row["work"]): row["failure"] for row in rows}
    assert failures == {("gumbel", "sample"): "wrong result", ("torch", "sample"): "", ("torch", "greedy"): ""}
