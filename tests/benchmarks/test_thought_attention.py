"""The attention benchmark: what it counts, that its comparators compute the same thing, and one small run of it all."""

from __future__ import annotations

import csv
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import thought_attention
from benchmarks.gpu_timing import Ceilings, Measurement, Meter, Session, Timing, relative_error
from benchmarks.thought_attention import Problem, Shape, backward_tile, main, parser, sees, shapes

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = Shape("tiny", length=10, stream_length=3, batch=2, heads=4, kv_heads=2, head_size=8)


def test_counted_pairs_are_those_of_the_mask() -> None:
    L, S = SHAPE.length, SHAPE.stream_length
    mask = sees(torch.arange(L * S)[:, None], torch.arange(L + L * S)[None, :], L, S)
    assert SHAPE.pairs == SHAPE.batch * SHAPE.heads * int(mask.sum())
    assert SHAPE.flops("forward") == 4 * SHAPE.head_size * SHAPE.pairs


def test_least_bytes_are_those_of_the_tensors() -> None:
    problem = Problem(SHAPE, torch.float32, torch.device("cpu"))
    q, keys = (x.numel() * 4 for x in (problem.q, problem.keys))
    lse = 4 * problem.q[..., 0].numel()
    assert SHAPE.least_bytes("forward", 4) == 2 * q + 2 * keys + lse
    assert SHAPE.least_bytes("backward", 4) == 4 * q + 4 * keys + lse
    k_text, k_own = problem.text_and_own(problem.keys)
    read = sum(k_text.numel() + k_own[:, :, : t + 1].numel() for t in range(SHAPE.stream_length))
    assert SHAPE.least_bytes("steps", 4) == 2 * q + 2 * 4 * read


def test_the_expected_result_does_not_depend_on_how_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(SHAPE, torch.float32, torch.device("cpu"))
    whole = problem.expected
    del problem.expected
    monkeypatch.setattr(thought_attention, "REFERENCE_SCORES", 1)
    for name, expected in whole.items():
        assert relative_error(problem.expected[name], expected) < 1e-6


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("keys", [64, 128])
def test_backward_tiles_keep_the_kernels_rules(rows: int, keys: int) -> None:
    """FlexAttention's backward kernel asserts these while it compiles, which only a GPU would show."""
    fields = ("block_m1", "block_n1", "block_m2", "block_n2", "num_stages", "num_warps")
    config = dataclasses.make_dataclass("Config", fields)(64, 128, 128, 64, 3, 8)
    tile = backward_tile(config, rows, keys)
    assert rows % tile.block_m1 == rows % tile.block_m2 == keys % tile.block_n1 == keys % tile.block_n2 == 0
    assert tile.block_n1 % tile.block_m1 == tile.block_m2 % tile.block_n2 == 0
    older = dataclasses.make_dataclass("Config", ("block_m", "block_n", "num_stages", "num_warps"))(64, 128, 3, 8)
    tile = backward_tile(older, rows, keys)
    assert rows % tile.block_m == rows % tile.block_n == keys % tile.block_m == keys % tile.block_n == 0
    assert tile.block_n % tile.block_m == 0


def test_flex_compiles_with_the_tiles_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.choices import InductorChoices

    config = dataclasses.make_dataclass("Config", ("block_m", "block_n", "num_stages", "num_warps"))(128, 64, 3, 8)
    for name in ("get_flex_attention_fwd_configs", "get_flex_attention_bwd_configs"):
        monkeypatch.setattr(InductorChoices, name, lambda self, *arguments: [config, config])
    choices = InductorChoices()
    with thought_attention.flex_tiles((64, 128)):
        (tile,) = choices.get_flex_attention_fwd_configs(128, torch.bfloat16, "cuda")
        assert (tile.block_m, tile.block_n) == (64, 128)
        assert len(choices.get_flex_attention_bwd_configs(128, torch.bfloat16, "cuda")) == 1
    with thought_attention.flex_tiles(None):
        assert choices.get_flex_attention_fwd_configs(128, torch.bfloat16, "cuda") == [config, config]


def test_later_problems_take_the_variant_that_was_fastest() -> None:
    session = Session(Meter(torch.device("cpu")), Ceilings(1.0, 1.0, torch.float32), ours=())
    names = ["efficient", "cudnn"]
    assert thought_attention.fastest(session, "sdpa", "forward", names) == names
    for side, seconds in (("sdpa, efficient", 0.2), ("sdpa, cudnn", 0.1), ("triton", 0.1), ("parts, flash", 0.1)):
        row = Measurement(SHAPE.point, "forward", side, 1, 1, Timing(seconds, seconds, seconds, 1))
        session.rows.append(row)
    assert thought_attention.fastest(session, "sdpa", "forward", names) == ["cudnn"]
    assert thought_attention.fastest(session, "sdpa", "steps", names) == names
    assert thought_attention.fastest(session, "triton", "forward", [""]) == [""]
    assert thought_attention.fastest(session, "parts", "forward", ["flash", "cudnn"]) == ["flash", "cudnn"]


def test_shapes_of_a_gpu_are_the_targets_and_more() -> None:
    found = list(shapes(parser().parse_args([]), on_gpu=True))
    points = [(shape.model, shape.length, shape.stream_length, sweep) for shape, sweep in found]
    lengths = [("mistral-7b", L, S, (L, S) == (256, 16)) for L in (256, 1024, 4096) for S in (16, 24)]
    assert points == [*lengths, ("small", 256, 16, False)]


def run(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    main(["--quick", "--device", "cpu", "--output-dir", str(tmp_path), *arguments])
    text = (tmp_path / "thought_attention_cpu.csv").read_text()
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_side_that_a_cpu_can_run_is_right_and_timed(tmp_path: Path) -> None:
    rows = run(tmp_path, "--sides", "torch", "reference", "sdpa", "flex", "parts")
    assert [row["failure"] for row in rows] == [""] * len(rows)
    works = {side: [row["work"] for row in rows if row["side"] == side] for side in (row["side"] for row in rows)}
    every = ["forward", "backward", "steps"]
    assert works == {
        **{"torch": every, "reference": every, "sdpa, default": every, "parts, flash": every},
        "flex, default": ["forward"],
    }
    assert all(float(row["ms"]) > 0 and float(row["relative_error"]) < 1e-5 for row in rows)
    assert "| not measured |" in (tmp_path / "thought_attention_cpu.md").read_text()


def test_a_comparator_that_computes_something_else_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thought_attention, "sees", lambda query, key, L, S: key >= 0)  # no mask at all
    rows = run(tmp_path, "--sides", "torch", "sdpa", "--work", "forward", "backward")
    failures = {(row["side"], row["work"]): row["failure"] for row in rows}
    assert failures == {
        ("torch", "forward"): "",
        ("torch", "backward"): "",
        ("sdpa, default", "forward"): "wrong result",
    }


def test_a_mask_that_nobody_would_build_is_not_tried(tmp_path: Path) -> None:
    rows = run(tmp_path, "--sides", "sdpa", "--largest-mask", "1000")
    assert [row["failure"] for row in rows] == ["not tried", "not tried"]  # forward and steps


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="wants TRITON_INTERPRET=1")
def test_the_side_of_a_gpu_runs_interpreted(tmp_path: Path) -> None:
    rows = run(tmp_path, "--sides", "triton", "torch", "--lengths", "4", "--batch", "1")
    assert [row["failure"] for row in rows] == [""] * 6
    assert all(float(row["relative_error"]) < 1e-5 for row in rows)
    assert {row["ratio"] for row in rows if row["side"] == "triton"} == {"1"}
