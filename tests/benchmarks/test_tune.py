"""The tuner prefers what it says it prefers, and changes the lines that it chose."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert chosen.configuration["BLOCK_M"] == 32
    assert chosen.spilled() == 4 * 32


def test_elementwise_kernels_keep_their_configuration_without_a_clock() -> None:
    line = problem("mixed_cross_entropy.loss", "32-bit")
    assert len(line.candidates(timed=False)) == 1
    assert len(line.candidates(timed=True)) > 10


def test_only_the_chosen_lines_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "configurations.json"
    shutil.copy(configurations.PATH, path)
    before = json.loads(path.read_text())
    monkeypatch.setattr(configurations, "PATH", path)
    chosen = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_OWN": 16, "num_warps": 4, "num_stages": 1}
    tune.write({problem(): tune.Candidate(chosen)})
    after = json.loads(path.read_text())
    assert after["sm_90"]["thought_attention.forward"].pop("16-bit D128") == chosen
    before["sm_90"]["thought_attention.forward"].pop("16-bit D128")
    assert after == before


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
