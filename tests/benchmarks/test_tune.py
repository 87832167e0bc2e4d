"""The tuner prefers what it says it prefers, and changes the lines that it chose."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks import tune
from benchmarks.ahead_of_time import Compiled
from quietstar_kernels import configurations

ROOT = Path(__file__).resolve().parents[2]


def problem(kernel: str = "thought_attention.forward", case: str = "16-bit D128") -> tune.Problem:
    return tune.Problem("sm_90", kernel, case)


class FakeCompilers:
    """Compiles nothing: spills where `spills` says so for a task's configuration and variant."""

    def __init__(self, spills: dict[str, int]) -> None:
        self.spills = spills
        self.asked: list[tuple[dict[str, int], str]] = []

    def compile(self, task: tune.Task) -> Compiled:
        configuration = dict(task.configuration)
        self.asked.append((configuration, task.variant))
        return Compiled(registers=128, spill_stores=self.spills.get(task.variant, 0) * configuration["BLOCK_M"])


def test_candidates_are_unique_and_hold_the_pinned_configuration() -> None:
    found = [candidate.configuration for candidate in problem().candidates(timed=True)]
    assert configurations.table()["sm_90"]["thought_attention.forward"]["16-bit D128"] in found
    assert len({tuple(sorted(configuration.items())) for configuration in found}) == len(found) > 50


def test_every_kernel_with_matrix_products_has_candidates() -> None:
    for found in tune.problems("sm_90", "thought_attention", ""):
        assert len(found.candidates(timed=False)) > 1


def test_by_compile_takes_the_largest_tile_with_most_stages_and_fewest_warps_that_does_not_spill() -> None:
    compilers = FakeCompilers({})
    chosen = tune.choose_by_compile(problem(), compilers, keep=False)
    largest = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_OWN": 64, "num_warps": 4, "num_stages": 3}
    assert chosen.configuration == largest
    assert {variant for _, variant in compilers.asked} == set(problem().variants)


def test_by_compile_keeps_what_does_not_spill_if_told_so() -> None:
    compilers = FakeCompilers({})
    chosen = tune.choose_by_compile(problem(), compilers, keep=True)
    assert chosen.configuration == problem().pinned


def test_by_compile_falls_back_to_what_spills_least_in_its_worst_variant() -> None:
    compilers = FakeCompilers({"softcap": 4, "plain": 1})
    chosen = tune.choose_by_compile(problem(), compilers, keep=False)
    assert chosen.configuration["BLOCK_M"] == 16
    assert chosen.spilled() == 4 * 16


def test_elementwise_kernels_keep_their_configuration_without_a_clock() -> None:
    line = problem("mixed_cross_entropy.loss", "32-bit")
    assert len(line.candidates(timed=False)) == 1
    assert len(line.candidates(timed=True)) > 10


def test_only_the_chosen_lines_are_written(tmp_path: Path) -> None:
    path = tmp_path / "configurations.json"
    before = json.loads(configurations.PATH.read_text())
    chosen = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_OWN": 16, "num_warps": 4, "num_stages": 1}
    tune.write({problem(): tune.Candidate(chosen)}, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    after = json.loads(path.read_text())
    assert after["sm_90"]["thought_attention.forward"].pop("16-bit D128") == chosen
    before["sm_90"]["thought_attention.forward"].pop("16-bit D128")
    assert after == before


@pytest.mark.parametrize(("kernel", "case"), list(tune.SHORTLIST))
def test_the_shortlist_has_the_pinned_line_first_and_lines_of_the_same_keys(kernel: str, case: str) -> None:
    found = [candidate.configuration for candidate in problem(kernel, case).shortlist()]
    assert found[0] == configurations.table()["sm_90"][kernel][case]
    assert len({tuple(line.items()) for line in found}) == len(found) > 1
    for line in found:
        assert set(line) - {"maxnreg"} == set(found[0]) - {"maxnreg"}


def test_the_shortlist_fits_a_visit_of_a_gpu_and_tries_what_the_table_does_not() -> None:
    lines = [line for kernel, case in tune.SHORTLIST for line in problem(kernel, case).shortlist()]
    assert 20 <= len(lines) <= 30
    assert any("maxnreg" in line.configuration for line in lines)
    steps = problem("thought_attention.step").shortlist()
    assert 16 in {line.configuration["BLOCK_M"] for line in steps}


class Clock:
    """Times nothing: a candidate's milliseconds are given by its configuration; some do not run."""

    device = torch.device("meta")

    def __init__(self, fastest: dict[str, int]) -> None:
        self.fastest = fastest

    def seconds(self, configuration: dict[str, int]) -> float:
        if configuration["BLOCK_N"] == 128:
            raise RuntimeError("out of resources")
        return 0.001 if configuration == self.fastest else 0.002


def test_what_a_shortlist_has_measured_is_on_the_disk_after_every_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is taken away leaves a table that can be committed; the package's own is not touched."""
    before = configurations.PATH.read_bytes()
    lines = [problem(kernel) for kernel in ("thought_attention.backward_text", "thought_attention.step")]
    fastest = lines[0].shortlist()[2].configuration
    clock = Clock(fastest)

    def time_candidate(_: tune.Problem, candidate: tune.Candidate, meter: Clock) -> None:
        try:
            candidate.seconds = meter.seconds(candidate.configuration)
        except RuntimeError as error:
            candidate.failure = str(error)

    monkeypatch.setattr(tune, "time_candidate", time_candidate)
    parser = tune.Benchmark(tune.__file__, "")
    parser.begin([])
    seen = []

    def save(done: dict[tune.Problem, list[tune.Candidate]]) -> None:
        tune.save_shortlist(done, tmp_path, "h200", parser)
        with (tmp_path / "tune_h200.csv").open() as file:
            rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
        seen.append((rows, json.loads((tmp_path / "configurations.json").read_text())))

    with ThreadPoolExecutor(1) as threads:
        tune.time_shortlist(lines, FakeCompilers({}), threads, clock, save)  # type: ignore[arg-type]
    assert [len(rows) for rows, _ in seen] == list(range(1, sum(len(line.shortlist()) for line in lines) + 1))
    rows, table = seen[-1]
    text = [row for row in rows if row["kernel"].endswith("backward_text")]
    assert [row["note"] for row in text if "fastest" in row["note"]] == ["fastest"]
    assert [row["ms"] for row in text if row["note"] == "out of resources"] == [""]
    pinned = json.loads(before)
    pinned["sm_90"]["thought_attention.backward_text"]["16-bit D128"] = fastest
    assert {kernel: cases for kernel, cases in table["sm_90"].items() if kernel != "thought_attention.step"} == {
        kernel: cases for kernel, cases in pinned["sm_90"].items() if kernel != "thought_attention.step"
    }
    first, second = seen[0][1], seen[2][1]
    assert first == json.loads(before) != second
    assert configurations.PATH.read_bytes() == before


SHARED_CACHE = """
import os
from benchmarks import ahead_of_time
from benchmarks.ahead_of_time import TARGETS, Compilers, Task, clean_environment, specialize

if __name__ == "__main__":
    clean_environment()
    with Compilers(1) as compilers:
        os.environ["TRITON_CACHE_DIR"] = compilers.cache
        import torch, triton
        from triton.backends.compiler import GPUTarget
        from benchmarks import kernel_cases
        from quietstar_kernels.configurations import table

        def compile(configuration):
            made = []
            triton.knobs.compilation.listener = lambda **facts: made.append(not facts["cache_hit"])
            launch = kernel_cases.launch(kernel, case, "plain", configuration, torch.device("meta"))
            source, options = specialize(launch, "sm_90")
            triton.compile(source, target=GPUTarget(*TARGETS["sm_90"]), options=options.__dict__)
            return made

        kernel, case = "mixed_cross_entropy.mix", "16-bit"
        pinned = table()["sm_90"][kernel][case]
        assert not compilers.compile(Task("sm_90", kernel, case, "plain", tuple(pinned.items()))).error
        print(compile(pinned), compile(pinned | {"num_warps": 2}))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists for Linux only")
def test_what_a_worker_has_compiled_is_loaded_and_not_compiled_again() -> None:
    """Each candidate was compiled twice, one after the other the second time: 300 candidates took 15 minutes."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, "-c", SHARED_CACHE], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["[False]", "[True]"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists for Linux only")
@pytest.mark.slow
def test_the_script_tunes_without_a_gpu_and_writes_nothing_when_told_so() -> None:
    before = configurations.PATH.read_bytes()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/tune.py", "--by", "compile", "--dry-run", "--architectures", "sm_90"]
    done = subprocess.run(
        [*command, "--kernels", "token_sampling"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert "the same" in done.stdout and "written" not in done.stdout
    assert configurations.PATH.read_bytes() == before
