"""Every kernel of the pinned table compiles, fits its chip, and is no worse than the committed table says.

No GPU is wanted. Triton's interpreter, under which the other tests run, is chosen for a whole process: what compiles
runs in processes of its own.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ahead_of_time, compile_kernels
from benchmarks.ahead_of_time import Compiled, Task, as_row
from benchmarks.environment import write_csv

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists for Linux only")

TASK = Task("sm_90", "thought_attention.forward", "16-bit D128", "plain", (("BLOCK_M", 128), ("num_warps", 8)))
COMPILED = Compiled(registers=168, shared_memory=96 * 1024, programs=2, async_copies=24, loops="212 + 493", wgmma=22)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository, without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )


@needs_triton
@pytest.mark.slow
def test_every_kernel_compiles_within_its_limits_and_no_worse_than_committed() -> None:
    """`is_usual` says what is left to `--all`: variants, and attention in 32 and 64 bits other than on sm_90."""
    # set by .ci/run, which has not the time to compile for every architecture with two versions of Triton
    only = os.environ.get("QUIETSTAR_COMPILE_FOR", "").split()
    done = python("benchmarks/compile_kernels.py", "--check", *(["--architectures", *only] if only else []))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-5000:]}"
    assert "within the limits" in done.stdout


FUSION = """
import os, torch
os.environ["TRITON_DEFAULT_FP_FUSION"] = "0"
from benchmarks import kernel_cases
from benchmarks.ahead_of_time import specialize
from quietstar_kernels.configurations import table

for kernel, cases in table()["sm_90"].items():
    case, configuration = next(iter(cases.items()))
    launch = kernel_cases.launch(kernel, case, "plain", configuration, torch.device("meta"))
    print(kernel, specialize(launch, "sm_90")[1].enable_fp_fusion)
"""


@needs_triton
def test_multiplications_and_additions_are_fused_whatever_triton_s_default_is() -> None:
    """Triton announces another default; its own variable for the default stands for that here."""
    done = python("-c", FUSION)
    assert done.returncode == 0, done.stderr[-5000:]
    fused = dict(line.split() for line in done.stdout.splitlines())
    assert len(fused) > 5 and set(fused.values()) == {"True"}


SAME_KERNEL = """
import json, torch
from benchmarks import kernel_cases
from benchmarks.ahead_of_time import specialize
from quietstar_kernels.configurations import table

def keys():
    found = {}
    for kernel, cases in table()["sm_90"].items():
        for case, configuration in cases.items():
            launch = kernel_cases.launch(kernel, case, "plain", configuration, torch.device("meta"))
            source, options = specialize(launch, "sm_90")
            found[f"{kernel}, {case}"] = f"{source.hash()} {options.hash()}"
    return found

before = keys()
kernel_cases.B, kernel_cases.L, kernel_cases.P, kernel_cases.S, kernel_cases.N = 3, 37, 11, 5, 101
kernel_cases.STEP_KEYS = 2
after = keys()
kernel_cases.B = kernel_cases.P = kernel_cases.N = 1
single = keys()
print(json.dumps({name: [before[name], after[name], single[name]] for name in before}))
"""


@needs_triton
def test_no_number_of_rows_compiles_a_kernel_of_its_own() -> None:
    """Batch, text length, streams, tokens and rows may be anything: the kernel is made of other things.

    The backward pass of the streams is two kernels: one of tiles that are a single block of rows, one of longer ones.
    """
    done = python("-c", SAME_KERNEL)
    assert done.returncode == 0, done.stderr[-5000:]
    keys: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    assert len(keys) > 50
    kernels = {name: len(set(found)) for name, found in keys.items()}
    assert [name for name, count in kernels.items() if count > 1 + ("backward_streams" in name)] == []


@needs_triton
def test_a_compiler_that_dies_is_a_result_and_the_next_task_is_still_compiled() -> None:
    script = """
import os
from benchmarks import ahead_of_time
if __name__ == "__main__":
    with ahead_of_time.Compilers(1) as compilers:
        assert compilers.triton_version()[0].isdigit()
        os.kill(compilers._workers[0]._process.pid, 9)
        print(compilers.compile(ahead_of_time.Task("sm_90", "nothing", "", "", ())).error)
        print(compilers.compile(ahead_of_time.Task("sm_90", "nothing", "", "", ())).error)
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.splitlines() == ["the compiler died with exit code -9", "KeyError: 'nothing'"]


def test_figures_are_read_from_the_report_of_nvidias_assembler() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    56 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 254 registers, used 1 barriers, 56 bytes cumulative stack size
"""
    assert ahead_of_time.read_nvidia(log) == {"registers": 254, "spill_stores": 12, "spill_loads": 16, "stack": 56}
    with pytest.raises(ValueError, match="no figures"):
        ahead_of_time.read_nvidia("")


def test_figures_are_read_from_amds_metadata() -> None:
    assembly = """
    .private_segment_fixed_size: 48
    .sgpr_count:     38
    .vgpr_count:     512
    .vgpr_spill_count: 11
"""
    assert ahead_of_time.read_amd(assembly) == {"registers": 512, "spill_stores": 11, "spill_loads": 0, "stack": 48}
    with pytest.raises(ValueError, match=r"no \.vgpr_count"):
        ahead_of_time.read_amd("")


@pytest.mark.parametrize(
    ("now", "problem"),
    [
        (COMPILED, None),
        (Compiled(registers=160, shared_memory=64 * 1024, wgmma=10), None),
        (Compiled(registers=169, shared_memory=96 * 1024, wgmma=22), "registers 168 -> 169"),
        (Compiled(registers=168, spill_stores=4, shared_memory=96 * 1024, wgmma=22), "spill_stores 0 -> 4"),
        (Compiled(registers=168, shared_memory=97 * 1024, wgmma=22), "shared_memory 98304 -> 99328"),
        (Compiled(registers=168, shared_memory=96 * 1024, mma_sync=64), "wgmma instructions 22 -> 0"),
    ],
)
def test_a_worse_figure_is_named_with_its_kernel(now: Compiled, problem: str | None) -> None:
    problems = compile_kernels.compare([as_row(TASK, COMPILED)], [as_row(TASK, now)])
    name = "sm_90, thought_attention.forward, 16-bit D128, plain"
    assert problems == ([] if problem is None else [f"{name}: {problem}"])


def test_a_table_made_with_other_lines_is_out_of_date() -> None:
    name, row = "sm_90, thought_attention.forward, 16-bit D128, plain", as_row(TASK, COMPILED)
    changed = dataclasses.replace(TASK, configuration=(("BLOCK_M", 64), ("num_warps", 8)))
    line, changed_line = "BLOCK_M=128 num_warps=8", "BLOCK_M=64 num_warps=8"
    assert compile_kernels.out_of_date([row], [TASK]) == []
    assert compile_kernels.out_of_date([row], [changed]) == [f"{name}: {line} -> {changed_line}"]
    assert compile_kernels.out_of_date([], [TASK]) == [f"{name}: not in the table -> {line}"]
    assert compile_kernels.out_of_date([row], []) == [f"{name}: {line} -> not pinned"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"error": "CompilationError: no"}, "does not compile: CompilationError: no"),
        ({"spill_stores": 8}, "spills 8 bytes"),
        ({"spill_stores": 8, "kernel": "thought_attention.backward_text"}, None),
        ({"spill_stores": 8, "kernel": "thought_attention.step", "case": "32-bit D256"}, None),
        ({"wgmma": 0, "mma_sync": 64}, "no wgmma instruction"),
        ({"wgmma": 0, "case": "32-bit D128"}, None),
        ({"wgmma": 0, "kernel": "thought_attention.step"}, None),
        ({"shared_memory": 228 * 1024}, "228.0 KiB of shared memory"),
        ({"architecture": "sm_86", "shared_memory": 100 * 1024}, "where sm_86 has 99 KiB"),
        ({"architecture": "sm_100", "tensor_memory": 1024}, "1024 columns of tensor memory"),
    ],
)
def test_limits_hold_without_a_table(changes: dict[str, object], problem: str | None) -> None:
    found = compile_kernels.beyond_limits(as_row(TASK, COMPILED) | changes)
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


def test_a_spill_of_one_release_is_excused_under_that_release_alone() -> None:
    key = next(iter(compile_kernels.SPILLS_UNDER["3.7"]))
    row = as_row(TASK, COMPILED) | dict(zip(compile_kernels.KEY, key, strict=True)) | {"spill_stores": 20}
    assert compile_kernels.beyond_limits(row, "3.7.1") == []
    assert len(compile_kernels.beyond_limits(row, "3.9.0")) == len(compile_kernels.beyond_limits(row)) == 1
    assert len(compile_kernels.beyond_limits(row | {"architecture": "sm_80"}, "3.7.1")) == 1


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    row = as_row(TASK, COMPILED)
    path = tmp_path / "table.csv"
    write_csv(path, {"reason": "because, of 1 # thing"}, [row])
    read = compile_kernels.read_table(path)
    assert read == [{name: str(value) for name, value in row.items()}]
    assert compile_kernels.compare(read, [row]) == []
    assert compile_kernels.table_path("3.9.0+git1") == compile_kernels.table_path("3.9.1")
