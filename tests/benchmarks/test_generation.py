"""The benchmark of generation measures each way by itself, says whether its claims hold, and runs."""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import generation
from benchmarks.environment import ROOT
from benchmarks.generation import (
    BASE,
    MODELS,
    NO_CACHE,
    STATIC,
    THOUGHTS,
    TRAINING,
    Clock,
    Reading,
    Side,
    claims,
    main,
    take,
)
from benchmarks.launches import Call, Launches, changed

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


# -- launches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "operators", "launches", "waits"),
    [
        (lambda x: x.view(-1)[1:].t().unsqueeze(0), 4, 0, 0),
        (lambda x: x + 1, 1, 1, 0),
        (lambda x: x.add_(1)[:2].zero_(), 3, 2, 0),
        (lambda x: torch.nn.functional.linear(x[None], x), 5, 1, 0),  # in parts: two views, the product, and back
        (lambda x: x.sum().item(), 2, 1, 1),
        (lambda x: (x > 0).nonzero(), 2, 2, 1),
        (lambda x: torch.empty_like(x), 1, 0, 0),
        (lambda x: torch.cat([x, x]).reshape(2, 2, 8), 2, 1, 0),
        (lambda x: x.t().reshape(16), 3, 1, 0),
        (lambda x: x.to(torch.float64), 1, 1, 0),
        (lambda x: x.to(torch.float32).contiguous(), 0, 0, 0),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_operators_are_counted_alike_in_inference_mode(
    mode: Any, work: Any, operators: int, launches: int, waits: int
) -> None:
    """In inference mode composite operators arrive whole: a sixth fewer of them were no sixth less work."""
    with mode(), Launches() as found:
        work(torch.ones(4, 4))
    created = 1  # torch.ones
    assert (found.operators, found.launches, found.waits) == (operators + created, launches + created, waits)


def test_a_launch_is_told_apart_by_what_a_graph_would_repeat() -> None:
    memory, column = torch.zeros(4, 8), torch.tensor([1])

    def calls_of(work: Any) -> list[Call]:
        with torch.no_grad(), Launches() as found:
            work()
        return found.calls

    write = calls_of(lambda: memory.index_copy_(1, column, torch.ones(4, 1)))
    column.add_(1)
    assert not changed(write, calls_of(lambda: memory.index_copy_(1, column, torch.ones(4, 1))))
    for work in (
        lambda: memory.index_copy_(1, column, torch.ones(4, 1, dtype=torch.float64).float()),  # one more
        lambda: memory[:, 1:].index_copy_(1, column, torch.ones(4, 1)),  # elsewhere
        lambda: memory[:, :7].index_copy_(1, column, torch.ones(4, 1)),  # another shape
        lambda: memory.index_copy_(0, column, torch.ones(1, 8)),  # another number
        lambda: memory.index_add_(1, column, torch.ones(4, 1)),  # another operator
    ):
        assert changed(write, calls_of(work))


@pytest.mark.slow
def test_operators_are_counted_beside_those_of_another_commit(tmp_path: Path) -> None:
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip("no checkout")
    options = "--operators --against HEAD --batches 1 --turns 1 --repeats 1 --thoughts 2 --output-dir"
    main([*options.split(), str(tmp_path)])
    text = (tmp_path / "generation_operators.csv").read_text()
    rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
    sides = {row["side"]: row for row in rows if row["code"] == "HEAD"}
    assert len(rows) == 2 * len(sides) and {BASE, STATIC, THOUGHTS, TRAINING} <= set(sides)
    assert float(sides[BASE]["layer_passes"]) == MODELS["tiny"].layers
    assert float(sides[THOUGHTS]["layer_passes"]) == 3 * MODELS["tiny"].layers
    for row in rows:
        assert float(row["operators"]) > float(row["launches"]) > float(row["layer_launches"]) > 0
