"""The bars of an H200: bytes and operations against what the kernels really load, and the tables of pages."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from benchmarks import bars, kernel_cases, mixed_cross_entropy, on_gpu, thought_attention, token_sampling
from benchmarks.bars import Heads, Program
from benchmarks.gpu_timing import Target
from quietstar_kernels.dispatch import interpreting
from quietstar_kernels.launch import Launch
from tests.docs.pages import page, rows

needs_interpreter = pytest.mark.skipif(not interpreting(), reason="counts in Triton's interpreter")

NAMES = {
    "q": "q",
    "grad_q": "q",
    "out": "out",
    "grad_out": "out",
    "k_text": "text K, V",
    "v_text": "text K, V",
    "grad_k": "text K, V",
    "grad_v": "text K, V",
    "k_thought": "own K, V",
    "v_thought": "own K, V",
    "grad_k_thought": "own K, V",
    "grad_v_thought": "own K, V",
    "lse": "lse",
    "delta": "lse",
    "grad_lse": "lse",
}
"""A kernel's pointer -> what its bytes count as."""


def memory_of(launch: Launch) -> Iterator[tuple[str, int, int]]:
    """What a launch's pointers count as, and where their tensors lie."""
    for argument, value in launch.arguments.items():
        if isinstance(value, torch.Tensor) and (name := NAMES.get(argument.removesuffix("_pointer"))):
            yield name, value.data_ptr(), value.data_ptr() + value.numel() * value.element_size()


@contextmanager
def counted(launch: Launch) -> Iterator[Counter[str]]:
    """Counts the bytes that the interpreter loads and stores, by what they belong to."""
    from triton.runtime.interpreter import InterpreterBuilder

    found: Counter[str] = Counter()
    places = list(memory_of(launch))

    def count(pointers: Any, mask: Any) -> None:
        chosen = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for name, begin, end in places:
            found[name] += int(((chosen >= begin) & (chosen < end)).sum()) * size

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counting_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counting_store),
    ):
        yield found


@contextmanager
def products() -> Iterator[list[int]]:
    """Notes the operations of the interpreter's matrix products."""
    from triton.runtime.interpreter import InterpreterBuilder

    found: list[int] = []
    dot = InterpreterBuilder.create_dot

    def counting(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        found.append(2 * int(np.prod(left.data.shape)) * right.data.shape[1])
        return dot(self, left, right, *rest)

    with mock.patch.object(InterpreterBuilder, "create_dot", counting):
        yield found


SIZES = [
    Heads(batch=1, length=5, tokens=4, keys=4, heads=4, kv_heads=1, head_size=32),
    Heads(batch=2, length=9, tokens=3, keys=3, heads=4, kv_heads=2, head_size=32),
    Heads(batch=1, length=19, tokens=2, keys=2, heads=4, kv_heads=2, head_size=32),
    Heads(batch=1, length=33, tokens=1, keys=7, heads=2, kv_heads=1, head_size=32),  # a sampling step
    Heads(batch=1, length=7, tokens=5, keys=5, heads=3, kv_heads=3, head_size=32),
    Heads(batch=3, length=1, tokens=1, keys=1, heads=2, kv_heads=1, head_size=32),
]
TILE = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_OWN": 16, "num_warps": 4, "num_stages": 1}


def launched(kernel: str, problem: Heads, tile: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> tuple[Launch, int]:
    """A call on the CPU, and into how many parts the text's gradients are split."""
    sizes = {"B": problem.batch, "L": problem.length, "P": problem.length, "S": problem.tokens}
    for name, value in {**sizes, "H": problem.heads, "HKV": problem.kv_heads}.items():
        monkeypatch.setattr(kernel_cases, name, value)
    case = kernel_cases.Case(f"16-bit D{problem.head_size} fp16", "fp16", torch.device("cpu"))
    if kernel == "forward":
        launch = kernel_cases._attention_forward(case, tile, problem.tokens, problem.keys)
    else:
        launch = kernel_cases.KERNELS[f"thought_attention.{kernel}"][1](case, tile)
    return launch, int(launch.arguments.get("splits", 1))


@needs_interpreter
@pytest.mark.parametrize(
    ("kernel", "problem"),
    [
        *(("forward", problem) for problem in SIZES),
        *(
            (f"backward_{name}", problem)
            for name in ("streams", "text")
            for problem in SIZES
            if problem.tokens == problem.keys
        ),
    ],
    ids=str,
)
def test_bytes_and_operations_are_those_of_the_kernels(
    kernel: str, problem: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter says which addresses a kernel loads and stores, and which products it makes."""
    tile = {**TILE, "BLOCK_M": 64} if kernel == "backward_streams" else TILE  # all rows of a program in one block
    launch, splits = launched(kernel, problem, tile, monkeypatch)
    programs = {
        "forward": lambda: bars.forward_programs(problem, tile),
        "backward_streams": lambda: bars.streams_programs(problem, tile),
        "backward_text": lambda: bars.text_programs(problem, tile, splits),
    }[kernel]
    total = bars.launch_total(problem, programs())
    assert len(list(programs())) == launch.grid[0]
    with counted(launch) as moved, products() as made:
        launch.run()
    assert total.bytes == {name: count for name, count in moved.items() if count}
    assert total.flops == sum(made)


def test_streams_longer_than_a_block_are_not_counted() -> None:
    """Their kernel reads the rows a second time, which these counts would leave out."""
    with pytest.raises(ValueError, match="BLOCK_M: got 16, wanted at least 48"):
        list(bars.streams_programs(SIZES[1], TILE))


def test_a_tile_does_no_more_than_half_in_vain() -> None:
    """FLOPs of the tiles at the bars' problem hold the useful ones, and the bytes the least ones."""
    shape = thought_attention.Shape("mistral-7b", 256, 16, 8, 32, 8, 128)
    programs = bars.forward_programs(Heads(), bars.configuration("forward"))
    total = bars.launch_total(Heads(), programs)
    assert shape.flops("forward") < total.flops < 1.5 * shape.flops("forward")
    assert shape.least_bytes("forward", 2) < sum(total.bytes.values()) < 2.5 * shape.least_bytes("forward", 2)


@pytest.mark.parametrize(
    ("rows", "text"),
    # of one text and key head: each program's last anchor sees all up to it, in 16-bit keys and values of 128
    [(64, 257 / 2), (128, 258 / 2), (256, 260 / 2)],
)
def test_the_table_of_tiles(rows: int, text: float) -> None:
    line = next(line for line in bars.tiles_table(Heads()) if line[0].startswith(f"{rows} x "))
    named = dict(zip(bars.TILE_COLUMNS, line, strict=True))
    programs = 8 * 8 * 256 * 16 * 4 // rows
    assert int(named["programs"].replace(",", "")) == programs
    whole = 2 * 8 * 256 * 16 * 32 * 128 * 2 + 2 * 8 * 256 * 16 * 8 * 128 * 2 + 4 * 8 * 256 * 16 * 32
    assert float(named["with lse"]) == pytest.approx((whole + text * 512 * programs) / 1e6, abs=1)


def test_the_least_time_is_the_longest_of_three_for_each_kernel() -> None:
    found = bars.least_time([(989e9, 4.8e8, 0.0), (989e9, 9.6e9, 5.5e9), (989e8, 0.0, 1.1e10), (989e9, 0, 0)])
    assert found == pytest.approx({"products": 2e-3, "memory": 2e-3, "cache": 2e-3})


# --------------------------------------------------------------------------------------------------- what is committed


def test_the_committed_estimates_of_the_kernels_hold() -> None:
    committed = {row["name"]: row["estimate"] for row in bars.read(bars.TABLE)}
    for name, seconds in (bars.attention_estimates(Heads()) | bars.head_estimates()).items():
        assert committed[name] == f"{1000 * sum(seconds.values()):.2f}"


@pytest.mark.slow
def test_the_committed_table_is_what_the_script_writes() -> None:
    assert bars.read(bars.TABLE) == bars.estimates()


def test_the_page_of_kernels_has_the_committed_table() -> None:
    shown = {row[0]: row for row in rows(page("kernels"))}
    for row in rows(bars.tables(bars.read(bars.TABLE), {}))[1:]:
        assert row == shown[row[0]]
    table = rows(page("kernels"))
    for line in bars.tiles_table(Heads()):
        assert line in table


def test_an_estimate_is_never_called_a_measurement() -> None:
    text = bars.section({})
    assert "estimate, not measured" in text and "Estimates are no measurements" in text
    assert all(row[3:5] == ["-", "not measured"] for row in rows(text) if row[0] in {one.name for one in bars.BARS})


# ---------------------------------------------------------------------------------------------- beside what is measured


def write(folder: Path, *lines: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    with (folder / "rows.csv").open("w", newline="") as file:
        file.write("# date: today\n")
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


POINT = {"model": "mistral-7b", "L": 256, "S": 16}


def visit(place: Path) -> dict[str, Path]:
    """The folders of a visit that reached some parts."""
    attention = [
        {**POINT, "work": "forward", "side": "triton", "ms": 0.25},
        {**POINT, "work": "backward", "side": "triton", "ms": 1.4},
        {**POINT, "S": 24, "work": "steps", "side": "triton", "ms": 0.1},
        {**POINT, "work": "steps", "side": "triton", "ms": ""},
        {**POINT, "work": "forward", "side": "parts", "ms": 0.01},
    ]
    flex = [
        {**POINT, "work": "forward", "side": "flex, 128 x 128", "ms": 0.9},
        {**POINT, "work": "forward", "side": "flex, 64 x 64", "ms": 0.3},
        {**POINT, "work": "backward", "side": "flexible", "ms": 9.0},
    ]
    engine = {"backend": "triton", "seconds": 7.5, "weight_bytes": 2**30, "peak_bytes_above_weights": 2**31}
    write(place / "attention", *attention)
    write(place / "flex-2", *flex)
    other = {**engine, "backend": "torch", "of_measured": 0.99, "seconds": 1.0}
    faster = {**engine, "backend": "triton, fused layers", "of_measured": 0.61, "seconds": 6.0}
    write(place / "engine", other, {**engine, "of_measured": 0.49}, faster)
    return {"attention": place / "attention", "flex": place / "flex-2", "engine": place / "engine"}


@pytest.mark.parametrize(
    ("name", "measured", "verdict"),
    [
        ("forward", "0.25 ms", "met"),
        ("backward", "1.4 ms", "missed"),
        ("16 sampling steps", "-", "not measured"),  # the row has failed
        ("head, forward and backward, 8,192 rows", "-", "not measured"),  # not reached
        ("forward against FlexAttention's best", "1.2 x", "missed"),
        ("backward against FlexAttention's best", "-", "not measured"),
        ("Mistral-7B step, of the measured peak", "61 %", "moonshot"),
    ],
)
def test_what_is_measured_stands_beside_a_bar(tmp_path: Path, name: str, measured: str, verdict: str) -> None:
    found = {row[0]: row[3:5] for row in rows(bars.section(visit(tmp_path)))}
    assert found[name] == [measured, verdict]


def test_the_plan_stands_beside_the_measured_step(tmp_path: Path) -> None:
    planned = {row["name"]: row["estimate"] for row in bars.read(bars.TABLE)}
    found = {row[0]: row[1:] for row in rows(bars.section(visit(tmp_path))) if len(row) == 3}
    assert found["seconds"] == [planned["seconds"], "7.5"]
    assert found["GiB at the peak"] == [planned["GiB at the peak"], "3"]


def test_the_page_of_a_visit_has_the_bars(tmp_path: Path) -> None:
    visit(tmp_path)
    attempts = [
        {"part": part, "folder": folder, "outcome": on_gpu.DONE, "seconds": 1.0}
        for part, folder in (("attention", "attention"), ("flex", "flex-2"), ("engine", "engine"))
    ]
    state = {"card": "h200", "facts": {"gpu": "NVIDIA H200"}, "parts": {"attention": "a", "head": "b"}}
    text = on_gpu.page(tmp_path, {**state, "attempts": attempts})
    found = {row[0]: row[3:5] for row in rows(text) if len(row) == 7}
    assert found["forward"] == ["0.25 ms", "met"] and found["sampling, 2,048 rows"] == ["-", "not measured"]


def test_each_bar_is_looked_for_where_its_part_writes_it() -> None:
    """A part's script has a target of the same numbers, in the rows that the bar names."""
    known = {part.name: part for part in on_gpu.parts()}
    session = mock.Mock(**{"find.return_value": None})
    targets: list[Target] = []
    for module in (thought_attention, mixed_cross_entropy, token_sampling):
        targets += module.targets(session)
    for one in bars.BARS:
        assert one.part in known and (one.against is None or one.against[0] in known)
        if one.part != "engine":
            assert (one.must, one.moonshot) in {(target.must, target.stretch) for target in targets}


def test_a_program_is_summed_over_texts_and_key_heads() -> None:
    total = bars.launch_total(Heads(batch=2, kv_heads=3, heads=3), [Program(Counter(q=1), 5), Program(Counter(q=2), 7)])
    assert total == Program(Counter(q=18), 72)
