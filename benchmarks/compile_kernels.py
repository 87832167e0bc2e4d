"""Every kernel of the pinned table compiled for every architecture, without a GPU: registers, spills, shared memory.

    python benchmarks/compile_kernels.py

The lines of `configurations.json` are compiled through the same `Launch` that runs, by the Triton that is installed, in
the variants that make another kernel of them (window, soft cap, a head size that is no power of two, ...). The table is
printed and written to `benchmarks/results/compiled_kernels_triton_<version>.csv` and `.md`. A table that is worse than
the committed one wants `--reason`, which is written at its top.

`--check` writes nothing and fails where a kernel does not compile, does not fit its chip, spills in a forward pass,
lacks its matrix instructions, is alone on a Hopper multiprocessor or waits there for every copy, or is worse than its
committed row; a Triton without a committed table is held to the rest. This is what continuous integration runs, so the
table leaves out what `is_usual` says; `--all` compiles that too.
"""

from __future__ import annotations

import csv
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

from benchmarks.ahead_of_time import (
    MATRIX_INSTRUCTIONS,
    SHARED_MEMORY_LIMIT,
    TARGETS,
    TENSOR_MEMORY_LIMIT,
    Compiled,
    Compilers,
    Task,
    as_row,
    describe_configuration,
)
from benchmarks.environment import markdown_table
from benchmarks.script import RESULTS, Benchmark

KEY = ("architecture", "kernel", "case", "variant")
MAY_NOT_GROW = ("registers", "spill_stores", "spill_loads", "loop_spills", "stack", "shared_memory", "tensor_memory")
MAY_NOT_VANISH = (*MATRIX_INSTRUCTIONS, "async_copies")

SPILLED_FOR_COMPANY = 96
"""Bytes that a forward kernel may spill, stored or loaded, where `maxnreg` asks for it: a second program on the
multiprocessor hides more than a few loads cost; `loop_spills` tells how many of them every block of keys repeats."""

MAY_SPILL = {("thought_attention.step", "32-bit D256")}
"""Forward kernels and cases that spill a few bytes somewhere, in the smallest tile there is, 16 x 16. So may all in 64
bits, which are there to be right; no spill may grow."""

SPILLS_UNDER = {"3.7": {("sm_100", "thought_attention.forward", "16-bit D32", "window + softcap + stream starts")}}
"""Rows of which one release of Triton spills a few bytes (20), and those before and after it (3.6, 3.9) none."""

Row = Mapping[str, object]


def table_path(triton: str) -> Path:
    """Where the CSV of a Triton version lies; patch releases share one."""
    return RESULTS / f"compiled_kernels_triton_{minor_version(triton)}.csv"


def minor_version(triton: str) -> str:
    return ".".join(triton.split(".")[:2])


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("# ")))


def tasks(architectures: Sequence[str], kernels: str = "", *, everything: bool = False) -> list[Task]:
    """The lines of the pinned table, in their variants.

    Args:
        architectures: rows of the pinned table.
        kernels: a regular expression that the kernel's name must match.
        everything: also what `is_usual` leaves out.
    """
    from benchmarks.kernel_cases import variants
    from quietstar_kernels.configurations import table

    found = [
        Task(architecture, kernel, case, variant, tuple(configuration.items()))
        for architecture in architectures
        for kernel, cases in table()[architecture].items()
        for case, configuration in cases.items()
        if re.search(kernels, kernel)
        for variant in variants(kernel, case)
    ]
    return found if everything else [task for task in found if is_usual(task)]


def is_usual(task: Task) -> bool:
    """Whether a task is part of the table: every kernel and case in the variant with the most code.

    Left to `--all` are the other variants elsewhere, and attention in 32 and 64 bits elsewhere: it is correct rather
    than fast, nearly the same on every GPU, and so long that it takes the compilers most of their time.
    """
    if task.architecture == "sm_90":
        return task.case == "16-bit D128" or task.variant == variants_of(task)[-1]
    attention_in_full = task.kernel.startswith("thought_attention.") and not task.case.startswith("16-bit")
    return task.variant == variants_of(task)[-1] and not attention_in_full


def variants_of(task: Task) -> tuple[str, ...]:
    from benchmarks.kernel_cases import variants

    return variants(task.kernel, task.case)


def is_forward(kernel: str) -> bool:
    """Whether a kernel runs without gradients too, where a spill would cost every user."""
    return "backward" not in kernel and "gradient" not in kernel


def beyond_limits(row: Row, triton: str = "") -> list[str]:
    """What of a row no reason excuses; `triton` is the version that has compiled it."""
    name = ", ".join(str(row[part]) for part in KEY)
    if row["error"]:
        return [f"{name}: does not compile: {row['error']}"]
    architecture, kernel, case = str(row["architecture"]), str(row["kernel"]), str(row["case"])
    figures = {field: int(str(row[field])) for field in (*MAY_NOT_GROW, *MAY_NOT_VANISH, "programs")}
    problems = []
    limit = SHARED_MEMORY_LIMIT[architecture]
    if not Compiled(**figures).fits(architecture):
        problems.append(
            f"{name}: {figures['shared_memory'] / 1024:.1f} KiB of shared memory and {figures['tensor_memory']} "
            f"columns of tensor memory, where {architecture} has {limit} KiB and {TENSOR_MEMORY_LIMIT} columns"
        )
    known = tuple(row[part] for part in KEY) in SPILLS_UNDER.get(minor_version(triton), ())
    may_spill = (kernel, case) in MAY_SPILL or case.startswith("64-bit") or known
    allowed = SPILLED_FOR_COMPANY if "maxnreg" in str(row["configuration"]) else 0
    spilled = max(figures["spill_stores"], figures["spill_loads"])
    if is_forward(kernel) and not may_spill and spilled > allowed:
        problems.append(f"{name}: spills {spilled} bytes; a forward kernel may {allowed}")
    if needs_wgmma(architecture, kernel, case) and not figures["wgmma"]:
        problems.append(f"{name}: no wgmma instruction")
    if needs_company(architecture, kernel, case):
        if figures["programs"] < 2:
            problems.append(f"{name}: alone on its multiprocessor, where another program would hide what it waits for")
        if not figures["async_copies"]:
            problems.append(f"{name}: waits for every copy to shared memory")
    return problems


def needs_wgmma(architecture: str, kernel: str, case: str) -> bool:
    """Whether a kernel would run at a fraction of a Hopper GPU's speed without its own matrix instructions.

    A sampling step would not: it is bound by memory, and 64 rows of head size 256, the fewest of a wgmma, would spill.
    """
    attention = kernel.startswith("thought_attention.") and kernel != "thought_attention.step"
    return architecture == "sm_90" and attention and case.startswith("16-bit")


def needs_company(architecture: str, kernel: str, case: str) -> bool:
    """Whether a kernel has room for two programs on a Hopper multiprocessor; head sizes above 128 have not."""
    attention = architecture == "sm_90" and kernel.startswith("thought_attention.")
    return attention and case in ("16-bit D32", "16-bit D64", "16-bit D128")


def instructions(row: Row) -> int:
    """Of all its loops."""
    return sum(int(count) for count in str(row["loops"]).split(" + ") if count)


def worse(before: Row, now: Row) -> list[str]:
    """The figures in which a row is worse than its committed one."""
    name = ", ".join(str(now[part]) for part in KEY)
    if now["error"] or before["error"]:
        return []  # a kernel that does not compile is beyond the limits, and one that does now is no worse
    problems = [
        f"{name}: {field} {before[field]} -> {now[field]}"
        for field in MAY_NOT_GROW
        if int(str(now[field])) > int(str(before[field]))
    ]
    problems += [
        f"{name}: {field} instructions {before[field]} -> 0"
        for field in MAY_NOT_VANISH
        if int(str(before[field])) and not int(str(now[field]))
    ]
    if int(str(now["programs"])) < int(str(before["programs"])):
        problems.append(f"{name}: programs of a multiprocessor {before['programs']} -> {now['programs']}")
    if instructions(now) > instructions(before):
        problems.append(f"{name}: instructions of its loops {before['loops']} -> {now['loops']}")
    return problems


def key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[part]) for part in KEY)


def compare(before: Sequence[Row], now: Sequence[Row]) -> list[str]:
    """The figures in which rows are worse than the committed ones; rows that only one side has are left out."""
    committed = {key(row): row for row in before}
    return [problem for row in now if key(row) in committed for problem in worse(committed[key(row)], row)]


def out_of_date(before: Sequence[Row], wanted: Sequence[Task]) -> list[str]:
    """Where the committed table is not that of the pinned configurations, without compiling anything.

    Args:
        before: the committed rows.
        wanted: all tasks.
    """
    committed = {key(row): str(row["configuration"]) for row in before}
    pinned = {key(asdict(task)): describe_configuration(dict(task.configuration)) for task in wanted}
    return [
        f"{', '.join(name)}: {committed.get(name, 'not in the table')} -> {pinned.get(name, 'not pinned')}"
        for name in dict.fromkeys([*pinned, *committed])
        if committed.get(name) != pinned.get(name)
    ]


def markdown(rows: Sequence[Row]) -> str:
    """The table for people."""

    def cells(row: Row) -> list[str]:
        name = [str(row[part]) for part in (*KEY, "configuration")]
        if row["error"]:
            return [*name, "does not compile", *[""] * 7]
        spills = f"{row['spill_stores']} / {row['spill_loads']}"
        tensor = f" + {row['tensor_memory']} columns" if int(str(row["tensor_memory"])) else ""
        shared = f"{int(str(row['shared_memory'])) / 1024:.1f}{tensor}"
        matrix = ", ".join(f"{kind} {row[kind]}" for kind in MATRIX_INSTRUCTIONS if int(str(row[kind])))
        figures = [str(row["registers"]), spills, str(row["loop_spills"]), shared, str(row["programs"])]
        return [*name, *figures, str(row["async_copies"]), str(row["loops"] or "-"), matrix or "-"]

    figures = ("registers", "spills", "in loops", "shared memory", "programs", "async copies", "loops")
    columns = (*KEY, "configuration", *figures, "matrix instructions")
    return markdown_table(columns, [cells(row) for row in rows], text_columns=5)


LEGEND = """Registers and spills (bytes stored / loaded) are those of a thread, shared memory is in KiB of a program; on
sm_100 the columns of tensor memory stand beside it. On gfx942 the registers are vector registers, and the spills the
vector registers spilled. Programs are those that a multiprocessor holds at a time, by all of these. Loops are the
instructions of each innermost loop of matrix products, or of each innermost loop where there are none, and beside the
spills stands how many of them store or load what was spilled. Async copies, which the program does not wait for, and
matrix instructions are counted in the code, not as they run."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Benchmark(__file__, __doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers that run at a time")
    parser.add_argument("--architectures", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="ARCHITECTURE")
    parser.add_argument("--kernels", default="", metavar="REGEX", help="only kernels whose name matches")
    parser.add_argument("--all", action="store_true", help="every variant for every architecture; not written")
    parser.add_argument("--check", action="store_true", help="compare with the committed table; write nothing")
    parser.add_argument("--reason", help="why the new table may be worse than the committed one")
    options = parser.begin(arguments)

    start = time.perf_counter()
    wanted = tasks(options.architectures, options.kernels, everything=options.all)
    whole = options.architectures == list(TARGETS) and not options.kernels and not options.all
    rows_by_task: dict[Task, Row] = {}
    compiler_seconds = 0.0
    with Compilers(options.jobs) as compilers:
        triton = compilers.triton_version()
        for task, compiled in compilers.compile_all(wanted):
            rows_by_task[task] = as_row(task, compiled)
            compiler_seconds += compiled.seconds
            if sys.stderr.isatty():
                print(f"\r{len(rows_by_task)}/{len(wanted)}", end="", file=sys.stderr, flush=True)
    rows = [rows_by_task[task] for task in wanted]
    if not rows:
        print("nothing to compile", file=sys.stderr)
        return 2

    print(markdown(rows))
    print(
        f"\n{len(rows)} kernels, triton {triton}, {time.perf_counter() - start:.0f} s with {options.jobs} jobs "
        f"({compiler_seconds:.0f} s of compilers)"
    )
    broken = [problem for row in rows for problem in beyond_limits(row, triton)]
    path = table_path(triton)
    committed = read_table(path) if path.exists() else []
    problems = compare(committed, rows)
    report("beyond the limits", broken)
    report(f"worse than {path.name}", problems)
    if options.check:
        outdated = out_of_date(committed, tasks(list(TARGETS))) if committed else []
        report(f"not what {path.name} was made with", outdated)
        if broken or problems or outdated:
            print(
                "\nMend the kernel, or its line of configurations.json. Where the change is worth it, remake the table "
                f"with triton {minor_version(triton)}:\n  {parser.prog} --reason 'why it is'"
            )
            return 1
        compared = f"no worse than {path.name}" if committed else f"no table of triton {triton} to compare with"
        print(f"within the limits; {compared}")
        return 0
    if not whole:
        print("\nnot written: not the rows of the table")
        return 0
    if problems and not options.reason:
        print("\nnot written: worse than the committed table, and no --reason says why that is right")
        return 1
    parser.facts["triton"] = triton
    if options.reason:
        parser.facts = {"reason": options.reason, **parser.facts}
    note = f"Changed because: {options.reason}\n\n" if options.reason else ""
    parser.write(path, f"Kernels compiled by Triton {triton}", note + LEGEND + "\n\n" + markdown(rows), rows)
    return 0


def report(title: str, problems: Sequence[str]) -> None:
    if problems:
        print(f"\n{title}:")
        print("\n".join(f"  {problem}" for problem in problems))


if __name__ == "__main__":
    sys.exit(main())
