"""Where nothing more can be written, older checkpoints stay whole and the policy holds."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.runs import Runs, assert_same_end, events, happened, lines, newest, state, steps

SMALL = 100
"""Bytes: no file of a run is smaller, so none can be written or grow."""


def _model_does_not_fit(runs: Runs) -> int:
    return (newest(runs.whole()) / "model.safetensors").stat().st_size // 2


def test_stop(runs: Runs, tmp_path: Path) -> None:
    text = runs.run(tmp_path, ("full_disk", 7, 99, _model_does_not_fit(runs)), expect=2)
    assert "the checkpoint of step 4 could not be written" in text and "File too large" in text
    assert f"the newest is {tmp_path / 'checkpoints' / 'step-00000002'}" in text and "Traceback" not in text
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert happened(tmp_path) == [(4, "save_failed")]
    runs.run(tmp_path)
    assert_same_end(tmp_path, runs.whole())


def test_continue(runs: Runs, tmp_path: Path) -> None:
    options = {"training__on_save_failure": "continue"}
    text = runs.run(tmp_path, ("full_disk", 7, 11, _model_does_not_fit(runs)), **options)
    assert "the checkpoint of step 4 could not be written" in text
    assert happened(tmp_path) == [(4, "save_failed")] and steps(tmp_path) == [6, 8]
    assert_same_end(tmp_path, runs.whole())


def test_the_last_checkpoint_has_to_be_written(runs: Runs, tmp_path: Path) -> None:
    options = {"training__on_save_failure": "continue"}
    text = runs.run(tmp_path, ("full_disk", 15, 99, _model_does_not_fit(runs)), expect=2, **options)
    assert "the checkpoint of step 8 could not be written" in text and steps(tmp_path) == [4, 6]
    runs.run(tmp_path)
    assert_same_end(tmp_path, runs.whole())


def test_a_checkpoint_that_was_not_written_is_not_the_best(runs: Runs, tmp_path: Path) -> None:
    """Step 2 has the smallest loss here, and step 6 the next one."""
    options = {"training__keep_best": "true", "training__keep_checkpoints": 1, "training__eval_every": 2}
    options |= {"training__learning_rate": 0.3, "training__warmup_steps": 8, "training__steps": 6}
    options["data__validation_fraction"] = 0.2
    fault = ("full_disk", 3, 7, _model_does_not_fit(runs))
    runs.run(tmp_path, fault, training__on_save_failure="continue", **options)
    losses = {line["step"]: line["loss"] for line in lines(tmp_path) if line["split"] == "eval"}
    assert losses[2] < losses[6] < losses[4]
    assert state(newest(tmp_path))["best"]["step"] == 6 and steps(tmp_path) == [6]


def test_a_signal_with_a_full_disk(runs: Runs, tmp_path: Path) -> None:
    text = runs.run(tmp_path, ("full_disk", 9, 99, _model_does_not_fit(runs)), ("send", 10, "SIGTERM"), expect=2)
    assert "the checkpoint of step 5 could not be written" in text and steps(tmp_path) == [2, 4]
    runs.run(tmp_path)
    assert_same_end(tmp_path, runs.whole())


def test_metrics_wait_for_room(runs: Runs, tmp_path: Path) -> None:
    """Nor can the messages be written, to a log on the same disk."""
    options = {"training__on_save_failure": "continue", "training__log_every": 1}
    runs.run(tmp_path, ("full_disk", 5, 11, SMALL), **options)
    assert happened(tmp_path) in ([(4, "save_failed")], [])  # events go to the same disk
    assert_same_end(tmp_path, runs.whole(training__log_every=1))


def test_metrics_that_never_get_room(runs: Runs, tmp_path: Path) -> None:
    runs.run(tmp_path, ("full_disk", 5, 99, SMALL), expect=2, training__log_every=1)
    assert steps(tmp_path) == [2] and max(line["step"] for line in lines(tmp_path)) == 2
    runs.run(tmp_path, training__log_every=1)
    assert_same_end(tmp_path, runs.whole(training__log_every=1))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with room for four checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", 0, b"size=400k"):
        pytest.skip(f"no file system can be mounted here: {os.strerror(ctypes.get_errno())}")
    yield disk
    libc.umount2(os.fsencode(disk), 2)


def test_a_disk_that_is_really_full(runs: Runs, small_disk: Path) -> None:
    run = small_disk / "run"
    ballast = small_disk / "ballast"
    runs.run(run, ("send", 4, "SIGTERM"), expect=143)
    ballast.write_bytes(b"0" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - 16_384))
    text = runs.run(run, expect=2)
    assert "No space left on device" in text and steps(run) == [2]
    assert "make room, or lower training.keep_checkpoints" in text  # said before the first step
    ballast.unlink()
    runs.run(run)
    assert_same_end(run, runs.whole())


def test_an_output_directory_that_cannot_be_written(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir(mode=0o555)
    text = runs.run(run, ("no_privileges",), expect=2)
    assert f"error: output_dir: cannot write to {run}" in text and "Traceback" not in text
    assert list(run.iterdir()) == []


def test_checkpoints_that_become_read_only(runs: Runs, tmp_path: Path) -> None:
    run, gate = tmp_path / "run", tmp_path / "gate"
    process = runs.launch(run, ("no_privileges",), ("pause", 7, str(gate)), training__on_save_failure="continue")
    process.until(gate.exists)
    process.until(lambda: steps(run) == [2])
    (run / "checkpoints").chmod(0o555)
    gate.unlink()
    assert process.wait() == 2
    assert "the checkpoint of step 8 could not be written" in process.text
    assert [(step, event) for step, event in happened(run)] == [(step, "save_failed") for step in (4, 6, 8)]
    (run / "checkpoints").chmod(0o755)
    runs.run(run)
    assert_same_end(run, runs.whole())
    assert events(run)[-1]["event"] == "finished"
