"""The benchmark of generation measures each way by itself, says whether its claims hold, and runs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import generation
from benchmarks.generation import BASE, MODELS, NO_CACHE, THOUGHTS, Clock, Reading, Side, claims, main, take

pytestmark = pytest.mark.usefixtures("one_thread")


def row(batch: int, length: int, step: float, ratio: float) -> dict[str, Any]:
    row: dict[str, Any] = {"model": "m", "context": 8, "side": THOUGHTS, "thought_length": length, "batch": batch}
    return row | {"step_seconds": step, "ratio_to_base": ratio}


def test_claims_are_told_apart() -> None:
    assert claims([row(1, 4, 1.0, 6.9), row(16, 4, 15.0, 2.0)]) == [
        "m, context 8, T = 4: 6.90 times the base's time for a token, at most 7: holds",
        "m, context 8, T = 4: a step of 16 texts takes 15.0 times that of one, below 16: holds",
    ]
    worse = claims([row(1, 4, 1.0, 7.1), row(16, 4, 17.0, 2.0)])
    assert all(claim.endswith("FAILS") for claim in worse) and len(worse) == 2


def test_a_step_is_the_time_from_the_first_new_token_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that counts the passes through the base: one for the prompt, T + 1 for a token that is thought about."""
    model = MODELS["tiny"].build(torch.device("cpu"))
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    model(torch.ones(1, 4, dtype=torch.int64))  # a model tries its base out once
    model.base.get_decoder().register_forward_hook(count)
    monkeypatch.setattr(generation, "clock_of", lambda meter: lambda: float(passes))
    ids = torch.arange(6)[None]
    for side, prompt, step in ((Side(BASE), 1, 1), (Side(THOUGHTS, 3), 5, 4), (Side(NO_CACHE, 3), None, 5)):
        reading = Reading()
        take(side, model, ids, 4, reading)
        assert reading.step == [step], side
        assert reading.prompt == ([] if prompt is None else [prompt]), side


def test_the_clock_stops_nothing() -> None:
    times = iter([1.0, 2.0, 5.0])
    clock = Clock(lambda: next(times), 3)
    assert not any(clock(torch.zeros(2, 4), None).any() for _ in range(3))
    assert clock.times == [1.0, 2.0]


def test_it_runs_and_writes_a_row_for_each_side(tmp_path: Path) -> None:
    options = "--model tiny --device cpu --thoughts 2 --batches 1 2 --context 12 --tokens 3 --repeats 1 --output-dir"
    main([*options.split(), str(tmp_path)])
    text = (tmp_path / "generation_cpu.csv").read_text()
    rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
    for batch, count in (("1", 6), ("2", 5)):
        mine = [row for row in rows if row["batch"] == batch]
        assert len({row["side"] for row in mine}) == len(mine) == count
        shares = {row["side"]: float(row["share"]) for row in mine}
        assert shares["thoughts"] == shares["no cache"] == 1 and shares["base"] == shares["never"] == 0
        assert 0 <= shares["entropy"] <= 1
    for row in rows:
        assert float(row["step_seconds"]) > 0
        assert float(row["ratio_to_base"]) == pytest.approx(
            float(row["step_seconds"])
            / float(next(b["step_seconds"] for b in rows if (b["side"], b["batch"]) == ("base", row["batch"])))
        )
    assert "T = 2:" in (tmp_path / "generation_cpu.md").read_text()
