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
from typing import Any

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


@pytest.mark.parametrize(
    ("architecture", "warps", "registers", "kibibytes", "programs"),
    [
        # by registers: 65,536 of them, given to a warp in units of 256
        ("sm_90", 8, 229, 96, 1),
        ("sm_90", 8, 129, 16, 1),
        ("sm_90", 8, 128, 16, 2),
        ("sm_90", 4, 168, 16, 3),
        ("sm_90", 4, 169, 16, 2),
        # by shared memory: 228 KiB, of which each takes one more
        ("sm_90", 4, 64, 113, 2),
        ("sm_90", 4, 64, 114, 1),
        ("sm_80", 4, 64, 81, 2),
        ("sm_86", 4, 64, 49, 2),
        ("gfx942", 4, 64, 32, 2),
        # by warps, and by programs
        ("sm_86", 8, 32, 0, 6),
        ("sm_90", 8, 32, 0, 8),
        ("sm_90", 1, 32, 0, 32),
    ],
)
def test_programs_of_a_multiprocessor(
    architecture: str, warps: int, registers: int, kibibytes: int, programs: int
) -> None:
    """The tables of NVIDIA's occupancy calculator, and AMD's 512 registers of a thread beside 64 KiB."""
    compiled = Compiled(registers=registers, shared_memory=1024 * kibibytes)
    assert ahead_of_time.resident_programs(compiled, architecture, warps) == programs


def machine_code(*lines: str) -> str:
    """As `nvdisasm` prints it: labels, and instructions with their places."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * place:04x}*/   {line} ;" for place, line in enumerate(lines)
    )


@pytest.mark.parametrize(
    ("lines", "loops"),
    [
        (["MOV R1, R2", "EXIT", ".L_x_0:", "BRA `(.L_x_0)"], []),
        (["MOV R1, R2", ".L_x_0:", "HMMA.16816 R0, R1", "IADD3 R1, R1, 1", "@P0 BRA `(.L_x_0)", "EXIT"], [3]),
        # a branch that asks a second register, and an instruction with a predicate that is no branch
        ([".L_x_0:", "HGMMA.64x64x16 R0", "@!P1 LDGSTS.E [R1]", "@P0 BRA P1, `(.L_x_0)", "EXIT"], [3]),
        # a part of a loop that lies behind the end of the program belongs to it, and makes no loop of its own
        (
            [
                ".L_x_0:",
                "HMMA R0",
                "@P0 BRA `(.L_x_1)",
                ".L_x_2:",
                "IADD3 R1",
                "@P1 BRA `(.L_x_0)",
                "EXIT",
                ".L_x_1:",
                "FMUL R2",
                "BRA `(.L_x_2)",
            ],
            [6],
        ),
        # loops within loops: without matrix products they are no more than a part of the one around them
        (
            [
                ".L_x_0:",
                ".L_x_1:",
                "LDG R3",
                "@P0 BRA `(.L_x_1)",
                "HMMA R0",
                "@P1 BRA `(.L_x_0)",
                ".L_x_2:",
                "DMMA R4",
                "NOP",
                "NOP",
                "@P2 BRA `(.L_x_2)",
                "EXIT",
            ],
            [4, 4],
        ),
        ([".L_x_0:", "HMMA R5", ".L_x_1:", "HMMA R0", "@P0 BRA `(.L_x_1)", "@P1 BRA `(.L_x_0)", "EXIT"], [2]),
        # a kernel without any
        ([".L_x_0:", "FADD R5", "@P0 BRA `(.L_x_0)", ".L_x_1:", "FMUL R0", "NOP", "@P1 BRA `(.L_x_1)", "EXIT"], [2, 3]),
    ],
)
def test_loops_are_found_in_the_machine_code(lines: list[str], loops: list[int]) -> None:
    assert [len(names) for names in ahead_of_time.loops_of(machine_code(*lines))] == loops


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
        ({}, None),
        ({"registers": 160, "shared_memory": 64 * 1024, "wgmma": 10, "programs": 3, "loops": "704"}, None),
        ({"loops": "300 + 405", "async_copies": 2}, None),
        ({"registers": 169}, "registers 168 -> 169"),
        ({"spill_stores": 4}, "spill_stores 0 -> 4"),
        ({"loop_spills": 1}, "loop_spills 0 -> 1"),
        ({"shared_memory": 97 * 1024}, "shared_memory 98304 -> 99328"),
        ({"wgmma": 0, "mma_sync": 64}, "wgmma instructions 22 -> 0"),
        ({"async_copies": 0}, "async_copies instructions 24 -> 0"),
        ({"programs": 1}, "programs of a multiprocessor 2 -> 1"),
        ({"loops": "212 + 494"}, "instructions of its loops 212 + 493 -> 212 + 494"),
        ({"loops": "212 + 493 + 1"}, "instructions of its loops 212 + 493 -> 212 + 493 + 1"),
    ],
)
def test_a_worse_figure_is_named_with_its_kernel(now: dict[str, Any], problem: str | None) -> None:
    problems = compile_kernels.compare([as_row(TASK, COMPILED)], [as_row(TASK, dataclasses.replace(COMPILED, **now))])
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
        ({"spill_stores": 8, "configuration": "BLOCK_M=128 num_warps=8 maxnreg=128"}, None),
        ({"spill_loads": 100, "configuration": "BLOCK_M=128 num_warps=8 maxnreg=128"}, "spills 100 bytes"),
        ({"programs": 1}, "alone on its multiprocessor"),
        ({"programs": 1, "case": "16-bit D256"}, None),
        ({"programs": 1, "architecture": "sm_80"}, None),
        ({"programs": 1, "kernel": "thought_attention.backward_text", "case": "16-bit D64"}, "alone"),
        ({"async_copies": 0}, "waits for every copy"),
        ({"async_copies": 0, "kernel": "mixed_cross_entropy.loss", "case": "32-bit"}, None),
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
