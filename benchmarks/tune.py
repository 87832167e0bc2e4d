"""The offline tuner of `configurations.json`: block sizes, warps and stages of every kernel for one architecture.

    python benchmarks/tune.py --by time                              # the GPU that is there
    python benchmarks/tune.py --by time --shortlist --output-dir DIR # what matters most, first
    python benchmarks/tune.py --by compile --architectures sm_90     # no GPU wanted

Candidates are the combinations in `CANDIDATES`, and the configuration that is pinned now. One that does not compile,
has no room on the chip or spills, in any variant, is out; if all are, those that spill least stay.

* `--by time`: of the rest the fastest, by the median time of the representative call in `kernel_cases.py` with a cold
  cache. The sizes of that call are fixed, and no size is part of a case: a batch of another size runs the same code.
* `--by compile`: of the rest the one with the largest tile, then the most stages, then the fewest warps: the larger a
  tile, the less is read for it, and stages hide the reading. This is a guess, for architectures that nobody has here;
  kernels without matrix products, whose tiles it says nothing about, keep their configuration.

The chosen rows replace those of the architecture in the table, unless `--dry-run`. Candidates are compiled once, by
processes whose cache this one reads.

`--shortlist` times the configurations of `SHORTLIST` beside the pinned ones and writes a table, `tune_<card>.md`, and
`configurations.json`, the pinned table with the fastest lines in their places, to the folder alone and after every
candidate: what was measured outlives a machine that is taken away.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

import torch

from benchmarks import kernel_cases
from benchmarks.ahead_of_time import TARGETS, Compiled, Compilers, Task, clean_environment, describe_configuration
from benchmarks.environment import markdown_table
from benchmarks.gpu_timing import Meter, card
from benchmarks.script import RESULTS, Benchmark
from quietstar_kernels import configurations
from quietstar_kernels.configurations import Configuration

Grid = dict[str, tuple[int, ...]]

CANDIDATES: dict[str, dict[str, Grid]] = {
    "thought_attention.(forward|step)": {
        "16-bit": {
            "BLOCK_M": (128, 64, 32, 16),
            "BLOCK_N": (128, 64, 32),
            "BLOCK_OWN": (64, 32, 16),
            "num_warps": (4, 8),
            "num_stages": (3, 2, 1),
        },
        "32-bit": {
            "BLOCK_M": (64, 32, 16),
            "BLOCK_N": (64, 32, 16),
            "BLOCK_OWN": (16,),
            "num_warps": (4, 8),
            "num_stages": (2, 1),
        },
        "64-bit": {
            "BLOCK_M": (32, 16),
            "BLOCK_N": (32, 16),
            "BLOCK_OWN": (16,),
            "num_warps": (4, 8),
            "num_stages": (1,),
        },
    },
    "thought_attention.backward_streams": {
        "16-bit": {
            "BLOCK_M": (128, 64, 32),
            "BLOCK_N": (128, 64, 32),
            "BLOCK_OWN": (32, 16),
            "num_warps": (4, 8),
            "num_stages": (2, 1),
        },
        "32-bit": {
            "BLOCK_M": (32, 16),
            "BLOCK_N": (32, 16),
            "BLOCK_OWN": (16,),
            "num_warps": (4, 8),
            "num_stages": (1,),
        },
        "64-bit": {"BLOCK_M": (16,), "BLOCK_N": (16,), "BLOCK_OWN": (16,), "num_warps": (4, 8), "num_stages": (1,)},
    },
    "thought_attention.backward_text": {
        "16-bit": {
            "BLOCK_M": (128, 64, 32),
            "BLOCK_N": (128, 64, 32),
            "num_warps": (4, 8),
            "num_stages": (3, 2, 1),
        },
        "32-bit": {"BLOCK_M": (32, 16), "BLOCK_N": (32, 16), "num_warps": (4, 8), "num_stages": (1,)},
        "64-bit": {"BLOCK_M": (16,), "BLOCK_N": (16,), "num_warps": (4, 8), "num_stages": (1,)},
    },
    "mixed_cross_entropy.(mix|hidden_gradient)": {
        precision: {
            "BLOCK_ROWS": (1,),
            "BLOCK_WIDTH": (512, 1024, 2048, 4096),
            "num_warps": (2, 4, 8, 16),
            "num_stages": (1, 2),
        }
        for precision in ("16-bit", "32-bit")
    },
    "mixed_cross_entropy.(loss|loss_gradient)|token_sampling.sample": {
        "32-bit": {
            "BLOCK_ROWS": (1,),
            "BLOCK_VOCABULARY": (1024, 2048, 4096, 8192, 16384),
            "num_warps": (4, 8, 16, 32),
            "num_stages": (1, 2),
        },
    },
}
"""Pattern of kernels -> precision -> the values of each key. A line of the table without candidates stays as it is."""

MATRIX_KEYS = ("BLOCK_M", "BLOCK_N", "BLOCK_OWN", "num_warps", "num_stages", "maxnreg")
TEXT_KEYS = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "maxnreg")
ROW_KEYS = ("BLOCK_ROWS", "BLOCK_VOCABULARY", "num_warps", "num_stages")

SHORTLIST: dict[tuple[str, str], tuple[tuple[str, ...], list[tuple[int, ...]]]] = {
    ("thought_attention.forward", "16-bit D128"): (
        MATRIX_KEYS,
        [
            (128, 32, 32, 8, 2, 128),
            (128, 64, 32, 8, 2, 128),
            (64, 64, 32, 4, 2),
            (64, 32, 16, 4, 2),
            (128, 64, 32, 8, 2),
            (128, 32, 32, 8, 3, 128),
            (256, 32, 32, 16, 2, 128),
        ],
    ),
    ("thought_attention.backward_text", "16-bit D128"): (
        TEXT_KEYS,
        [(32, 64, 4, 2), (64, 64, 8, 2), (32, 64, 8, 2, 128), (64, 128, 8, 2), (64, 64, 8, 1)],
    ),
    ("thought_attention.backward_streams", "16-bit D128"): (
        MATRIX_KEYS,
        [(64, 32, 16, 4, 2), (64, 64, 16, 8, 2), (64, 32, 16, 8, 2, 128), (64, 64, 32, 8, 1)],
    ),
    ("thought_attention.step", "16-bit D128"): (
        MATRIX_KEYS,
        [(64, 32, 32, 4, 2), (16, 32, 16, 4, 2), (32, 32, 32, 4, 2), (64, 64, 32, 8, 2, 128), (16, 64, 32, 4, 3)],
    ),
    ("mixed_cross_entropy.loss_gradient", "32-bit"): (ROW_KEYS, [(1, 8192, 16, 1), (1, 4096, 8, 1)]),
    ("token_sampling.sample", "32-bit"): (ROW_KEYS, [(1, 4096, 8, 1), (1, 8192, 16, 1), (1, 16384, 16, 1)]),
}
"""Kernel and case -> the names of the keys, and what is worth a GPU's first minutes: tiles that differ in what bounds
them, registers, the second level cache or latency. A last key that a line leaves out is not set."""

HOPELESS = 1024
"""Bytes spilled by a thread, stored and loaded, beyond which `--by compile` tries no other stages for a tile."""


@dataclass
class Candidate:
    """One configuration of a kernel.

    Attributes:
        compiled: by variant, as far as it has been compiled.
        seconds: median time of the plain variant, where it was measured.
        failure: why it did not run.
    """

    configuration: Configuration
    compiled: dict[str, Compiled] = field(default_factory=dict)
    seconds: float | None = None
    failure: str = ""

    @property
    def tile(self) -> int:
        return math.prod(size for name, size in self.configuration.items() if name in ("BLOCK_M", "BLOCK_N"))

    @property
    def footprint(self) -> tuple[int, ...]:
        """What decides about registers; stages and own keys change little."""
        return tuple(
            self.configuration[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps") if name in self.configuration
        )

    def __str__(self) -> str:
        return f"{describe_configuration(self.configuration)}, {self.spilled()} bytes spilled"

    def preference(self) -> tuple[int, ...]:
        """The order of `--by compile`, best first."""
        own = self.configuration.get("BLOCK_OWN", 0)
        return -self.tile, -self.configuration["num_stages"], self.configuration["num_warps"], -own

    def spilled(self) -> int:
        """Bytes spilled, stored and loaded, in the worst variant."""
        return max(compiled.spill_stores + compiled.spill_loads for compiled in self.compiled.values())


@dataclass(frozen=True)
class Problem:
    """One line of the table to be chosen."""

    architecture: str
    kernel: str
    case: str

    @property
    def variants(self) -> tuple[str, ...]:
        return kernel_cases.variants(self.kernel, self.case)

    @property
    def pinned(self) -> Configuration | None:
        return configurations.table()[self.architecture].get(self.kernel, {}).get(self.case)

    def shortlist(self) -> list[Candidate]:
        """The pinned configuration, then those of the shortlist."""
        keys, lines = SHORTLIST[self.kernel, self.case]
        found = [] if self.pinned is None else [self.pinned]
        for line in lines:
            configuration = dict(zip(keys, line, strict=False))
            found += [configuration] if configuration not in found else []
        return [Candidate(configuration) for configuration in found]

    def candidates(self, *, timed: bool) -> list[Candidate]:
        """Every configuration, the pinned one among them, by preference.

        Args:
            timed: False leaves out kernels without matrix products: nothing that a compiler says tells them apart.
        """
        found = [] if self.pinned is None else [self.pinned]
        for pattern, grids in CANDIDATES.items():
            grid = grids.get(self.case.split()[0]) if re.fullmatch(pattern, self.kernel) else None
            if grid is not None and (timed or "BLOCK_M" in grid):
                found += [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        unique = {tuple(sorted(configuration.items())): configuration for configuration in reversed(found)}
        return sorted(map(Candidate, unique.values()), key=Candidate.preference)

    def compile(self, candidate: Candidate, variants: Sequence[str], compilers: Compilers) -> bool:
        """Whether the candidate compiles in these variants and has room on the chip; spills are for the caller."""
        for variant in variants:
            task = Task(self.architecture, self.kernel, self.case, variant, tuple(candidate.configuration.items()))
            if variant not in candidate.compiled:
                candidate.compiled[variant] = compilers.compile(task)
            compiled = candidate.compiled[variant]
            if compiled.error or not compiled.fits(self.architecture):
                candidate.failure = compiled.error or f"{compiled.shared_memory / 1024:.0f} KiB of shared memory"
                return False
        return True


def choose_by_compile(problem: Problem, compilers: Compilers, *, keep: bool) -> Candidate:
    """The first candidate by preference that spills in no variant; else the one that spills least.

    Args:
        keep: begin with the pinned configuration.

    Raises:
        RuntimeError: none compiles and fits.
    """
    fallback: list[Candidate] = []
    candidates = problem.candidates(timed=False)
    if keep:
        candidates.sort(key=lambda candidate: candidate.configuration != problem.pinned)
    hopeless: set[tuple[int, ...]] = set()
    for candidate in candidates:
        if candidate.footprint in hopeless:
            continue
        # one variant after the other, so that most candidates that spill cost a single compilation
        for count in range(1, len(problem.variants) + 1):
            if not problem.compile(candidate, problem.variants[-count:], compilers):
                break
            if candidate.spilled():
                fallback.append(candidate)
                if candidate.spilled() > HOPELESS:
                    hopeless.add(candidate.footprint)
                break
        else:
            return candidate
    fallback = [candidate for candidate in fallback if problem.compile(candidate, problem.variants, compilers)]
    if not fallback:
        raise RuntimeError(f"{problem}: no candidate compiles and fits")
    return min(fallback, key=Candidate.spilled)


def choose_by_time(problem: Problem, compilers: Compilers, threads: ThreadPoolExecutor, meter: Meter) -> Candidate:
    """The fastest candidate of those that spill in no variant, or of the quarter that spills least.

    Raises:
        RuntimeError: none compiles, fits and runs.
    """
    plain, variants = "plain", problem.variants
    candidates = problem.candidates(timed=True)
    fits = list(threads.map(lambda candidate: problem.compile(candidate, (plain,), compilers), candidates))
    candidates = [candidate for candidate, fit in zip(candidates, fits, strict=True) if fit]
    clean = [candidate for candidate in candidates if not candidate.spilled()]
    candidates = clean or sorted(candidates, key=Candidate.spilled)[: max(1, len(candidates) // 4)]
    for candidate in candidates:
        time_candidate(problem, candidate, meter)
    ranking = sorted((c for c in candidates if c.seconds is not None), key=lambda c: c.seconds or math.inf)
    fitting = [candidate for candidate in ranking[:8] if problem.compile(candidate, variants, compilers)]
    if not fitting:
        reasons = {candidate.failure for candidate in candidates}
        raise RuntimeError(f"{problem}: no candidate compiles, fits and runs: {'; '.join(sorted(reasons))}")
    for candidate in ranking[:4]:
        milliseconds = 1000 * (candidate.seconds or 0)
        print(f"    {milliseconds:9.4f} ms  {candidate}", flush=True)
    return next((candidate for candidate in fitting if not candidate.spilled()), fitting[0])


def time_candidate(problem: Problem, candidate: Candidate, meter: Meter) -> None:
    """Measure the plain variant; what does not run says why."""
    try:
        launch = kernel_cases.launch(problem.kernel, problem.case, "plain", candidate.configuration, meter.device)
        launch.run()  # loads what a worker has compiled
        candidate.seconds = meter.time(launch.run).median
    except Exception as error:  # out of memory or of resources: the next candidate may do
        candidate.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def time_shortlist(
    wanted: Sequence[Problem],
    compilers: Compilers,
    threads: ThreadPoolExecutor,
    meter: Meter,
    save: Callable[[dict[Problem, list[Candidate]]], None],
) -> dict[Problem, list[Candidate]]:
    """Every candidate of these problems, compiled where it has the least and the most code, and timed.

    Args:
        save: what to do with the candidates that are done, after each.
    """
    waiting = {
        problem: [
            (
                candidate,
                threads.submit(
                    problem.compile, candidate, problem.variants[:: len(problem.variants) - 1 or 1], compilers
                ),
            )
            for candidate in problem.shortlist()
        ]
        for problem in wanted
    }
    done: dict[Problem, list[Candidate]] = {}
    for problem, candidates in waiting.items():
        for candidate, compiled in candidates:
            if compiled.result():
                time_candidate(problem, candidate, meter)
            done.setdefault(problem, []).append(candidate)
            save(done)
    return done


def fastest(candidates: Sequence[Candidate]) -> Candidate | None:
    """The one with the shortest time, where any has one."""
    timed = [candidate for candidate in candidates if candidate.seconds is not None]
    return min(timed, key=lambda candidate: candidate.seconds or math.inf, default=None)


def save_shortlist(done: dict[Problem, list[Candidate]], folder: Path, card: str, parser: Benchmark) -> None:
    """The table of a shortlist, and the pinned table with the fastest lines in their places."""
    rows = [
        {
            "kernel": problem.kernel,
            "case": problem.case,
            "configuration": describe_configuration(candidate.configuration),
            "ms": "" if candidate.seconds is None else f"{1000 * candidate.seconds:.4f}",
            "note": ", ".join(
                note
                for note, holds in {
                    "pinned": candidate.configuration == problem.pinned,
                    "fastest": candidate is fastest(candidates),
                    candidate.failure: bool(candidate.failure),
                }.items()
                if holds
            ),
        }
        for problem, candidates in done.items()
        for candidate in candidates
    ]
    body = markdown_table(tuple(rows[0]), [tuple(row.values()) for row in rows], text_columns=3)
    parser.save(folder / f"tune_{card}", "Configurations worth a GPU's first minutes", body, rows)
    chosen = {problem: best for problem, candidates in done.items() if (best := fastest(candidates))}
    write(chosen, folder / configurations.PATH.name)


def problems(architecture: str, kernels: str, cases: str) -> list[Problem]:
    """The lines of the table whose kernel and case match."""
    return [
        Problem(architecture, kernel, case)
        for kernel, found in configurations.table()[architecture].items()
        for case in found
        if re.search(kernels, kernel) and re.search(cases, case) and kernel in kernel_cases.KERNELS
    ]


def write(chosen: dict[Problem, Candidate], path: Path) -> None:
    """Replace lines of the pinned table, which is read again: others may have changed other lines.

    Args:
        path: of the new table, written at once.
    """
    table = json.loads(configurations.PATH.read_text(encoding="utf-8"))
    for problem, candidate in chosen.items():
        table[problem.architecture].setdefault(problem.kernel, {})[problem.case] = candidate.configuration
    whole = path.with_suffix(".new")
    whole.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    whole.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Benchmark(__file__, __doc__)
    parser.add_argument("--by", choices=("time", "compile"), required=True, help="how to choose")
    parser.add_argument(
        "--architectures", nargs="+", choices=TARGETS, metavar="ARCHITECTURE", help="for --by compile (default: all)"
    )
    parser.add_argument("--kernels", default="", metavar="REGEX", help="only kernels whose name matches")
    parser.add_argument("--cases", default="", metavar="REGEX", help="only cases that match, such as '16-bit D128'")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers that run at a time")
    parser.add_argument("--seconds", type=float, default=0.05, help="for --by time: of repetitions of a candidate")
    parser.add_argument("--device", default="cuda", help="for --by time")
    parser.add_argument("--keep", action="store_true", help="for --by compile: keep what fits and does not spill")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--shortlist", action="store_true", help="for --by time: only what `SHORTLIST` has")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="for --shortlist: folder for the tables")
    options = parser.begin(arguments)
    if options.shortlist and options.by != "time":
        parser.error("--shortlist: wants --by time")
    if options.by == "time" and options.architectures:
        parser.error("--architectures: --by time measures the GPU that is there")
    if options.by == "time" and not torch.cuda.is_available():
        parser.error("--by time: no CUDA device; --by compile needs none")

    clean_environment()  # before Triton is imported: what is interpreted can be neither compiled nor timed
    chosen: dict[Problem, Candidate] = {}
    with Compilers(options.jobs) as compilers, ThreadPoolExecutor(options.jobs) as threads:
        os.environ["TRITON_CACHE_DIR"] = compilers.cache
        if options.by == "compile":
            wanted = [
                problem
                for architecture in options.architectures or TARGETS
                for problem in problems(architecture, options.kernels, options.cases)
            ]
            found = threads.map(lambda problem: choose_by_compile(problem, compilers, keep=options.keep), wanted)
            for problem, candidate in zip(wanted, found, strict=True):
                chosen[problem] = candidate
                print(f"{problem.architecture}, {problem.kernel}, {problem.case}: {candidate}", flush=True)
        else:
            device = torch.device(options.device)
            meter = Meter(device, seconds=options.seconds)
            wanted = problems(configurations.architecture(device), options.kernels, options.cases)
            if options.shortlist:
                options.output_dir.mkdir(parents=True, exist_ok=True)

                def save(done: dict[Problem, list[Candidate]]) -> None:
                    save_shortlist(done, options.output_dir, card(device), parser)

                shortlisted = [problem for problem in wanted if (problem.kernel, problem.case) in SHORTLIST]
                time_shortlist(sorted(shortlisted, key=by_value), compilers, threads, meter, save)
                print((options.output_dir / f"tune_{card(device)}.md").read_text(encoding="utf-8"))
                return 0
            for problem in wanted:
                print(f"{problem.kernel}, {problem.case}", flush=True)
                chosen[problem] = choose_by_time(problem, compilers, threads, meter)
    print(summary(chosen))
    if not options.dry_run:
        write(chosen, configurations.PATH)
        print(f"written: {configurations.PATH.name}")
    return 0


def by_value(problem: Problem) -> int:
    """The place of a problem in the shortlist."""
    return list(SHORTLIST).index((problem.kernel, problem.case))


def summary(chosen: dict[Problem, Candidate]) -> str:
    """What was chosen, beside what was pinned."""
    columns = ("architecture", "kernel", "case", "configuration", "pinned before", "ms", "registers", "spilled bytes")
    rows = []
    for problem, candidate in chosen.items():
        pinned = problem.pinned or {}
        same = pinned == candidate.configuration
        rows.append(
            (
                problem.architecture,
                problem.kernel,
                problem.case,
                describe_configuration(candidate.configuration),
                "the same" if same else describe_configuration(pinned),
                "-" if candidate.seconds is None else f"{1000 * candidate.seconds:.4f}",
                str(max(compiled.registers for compiled in candidate.compiled.values())),
                str(candidate.spilled()),
            )
        )
    return markdown_table(columns, rows, text_columns=5)


if __name__ == "__main__":
    sys.exit(main())
