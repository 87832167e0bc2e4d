"""kill -9 at any moment: the same command again ends as if nothing had happened."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import Runs, assert_same_end, steps
from tests.faults.shards import stream_options
from tests.marks import slow

STEP = "step-00000006"
WRITTEN = ("config.json", "generation_config.json", "tokenizer_config.json", "state.json", "MANIFEST.json")
WRITTEN_BY_LIBRARIES = ("model.safetensors", "optimizer.safetensors")
ALL = (*WRITTEN, *WRITTEN_BY_LIBRARIES, "tokenizer.json")
STAGES = (
    f"mkdir {STEP}.new",
    *(f"open {name}" for name in WRITTEN),
    *(f"{stage} {name}" for name in WRITTEN_BY_LIBRARIES for stage in ("write", "half")),
    *(f"fsync {name}" for name in (*ALL, f"{STEP}.new", "checkpoints")),
    f"rename {STEP}.new",
    *(f"remove {name}" for name in ALL),
    "rmdir step-00000002",
)
"""Of the save of step 6, which removes that of step 2."""


def _before_the_save(runs: Runs, output_dir: Path) -> Path:
    """A run that is about to save step 6, with the checkpoints that it keeps until then."""
    runs.stopped_after(4, output_dir)
    for step in (1, 3):
        shutil.rmtree(output_dir / "checkpoints" / f"step-{step:08d}")
    return output_dir


def test_no_stage_of_a_save_is_left_out(runs: Runs, tmp_path: Path) -> None:
    run = _before_the_save(runs, tmp_path / "run")
    runs.run(run, ("list_operations", str(tmp_path / "operations")), training__steps=6)
    assert sorted((tmp_path / "operations").read_text().splitlines()) == sorted(STAGES)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [stage for stage in STAGES if not stage.startswith("fsync") or "." not in stage])
def test_kill_at_each_stage_of_a_save(runs: Runs, tmp_path: Path, stage: str) -> None:
    """The syncing of a file changes nothing that a killed process leaves; for that see the next test."""
    run = _before_the_save(runs, tmp_path / "run")
    runs.run(run, ("kill_at_operation", stage), expect=-9)
    assert max(steps(run)) == (6 if stage.startswith(("remove", "rmdir", "fsync checkpoints")) else 4)
    runs.run(run)
    assert_same_end(run, runs.whole())
    assert steps(run) == [6, 8]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage",
    [
        "half optimizer.safetensors",
        "open MANIFEST.json",
        *(f"fsync {name}" for name in ("model.safetensors", "MANIFEST.json", f"{STEP}.new", "checkpoints")),
        f"rename {STEP}.new",
        "remove MANIFEST.json",
    ],
)
def test_power_loss_in_a_save(runs: Runs, tmp_path: Path, stage: str) -> None:
    """What has been written and not synced is lost."""
    run = _before_the_save(runs, tmp_path / "run")
    runs.run(run, ("power_loss_at_operation", stage, str(run)), expect=-9)
    assert "damaged" not in runs.run(run)
    assert_same_end(run, runs.whole())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_kill_at_random_moments(runs: Runs, tmp_path: Path, shards: Path, seed: int) -> None:
    """Five kills each, after times of up to that of a whole run."""
    changes: dict[str, Any] = (
        {"training__report": "true"},
        {"data__packing": "separate", "training__micro_batch_size": 1},
        {"data__packing": "crop", "model__positions": "entropy:0.5", "training__reuse_sampling_pass": "false"},
        stream_options(shards, "parquet"),
    )[seed]
    whole = runs.whole(**changes)
    started = time.monotonic()
    runs.run(tmp_path / "timed", **changes)
    duration = time.monotonic() - started
    rng = random.Random(seed)
    moments: list[float] = []
    while len(moments) < 5:
        process = runs.launch(tmp_path / "run", **changes)
        moments.append(rng.uniform(0, duration))
        time.sleep(moments[-1])
        process.kill()
        if process.wait() == 0:  # it has been faster than its predecessor
            assert_same_end(tmp_path / "run", whole)
            shutil.rmtree(tmp_path / "run")
    runs.run(tmp_path / "run", **changes)
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("packing", ["joined", slow("separate"), slow("crop")])
def test_kill_in_the_middle_of_an_accumulation(runs: Runs, tmp_path: Path, packing: str) -> None:
    """With the gradients of the first of two micro-batches, in step 2 before any checkpoint, and in steps 4 and 7."""
    for micro_batch in (3, 7, 5):  # the second and third process begin with step 1 and step 5
        status = runs.launch(tmp_path, ("send", micro_batch, "SIGKILL"), data__packing=packing).wait()
        assert status == -9
    runs.run(tmp_path, data__packing=packing)
    assert_same_end(tmp_path, runs.whole(data__packing=packing))


@pytest.mark.parametrize("step", [1, 3, 5, 6])
def test_resume_at_any_step(runs: Runs, tmp_path: Path, step: int) -> None:
    """After the first step, in the middle of an epoch, at its end, and in that of a log window."""
    run = runs.stopped_after(step, tmp_path / "run")
    runs.run(run)
    assert_same_end(run, runs.whole())
