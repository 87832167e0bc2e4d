"""Training goes on while a checkpoint is written: one at a time, and none is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.runs import Runs, assert_same_end, lines, steps

EVERY_STEP = {"training__log_every": 1, "training__eval_every": 0, "training__save_every": 4}


def _held(runs: Runs, directory: Path) -> tuple[Path, Path]:
    hold = directory / "hold"
    hold.touch()
    return hold, directory / "run"


def test_steps_go_on_during_a_save_and_the_next_save_waits(runs: Runs, tmp_path: Path) -> None:
    hold, run = _held(runs, tmp_path)
    process = runs.launch(run, ("hold_saves", str(hold)), **EVERY_STEP)
    process.until(lambda: (run / "metrics.jsonl").exists() and lines(run) and lines(run)[-1]["step"] == 8)
    assert not process.ended and steps(run) == []
    hold.unlink()
    assert process.wait() == 0
    assert steps(run) == [4, 8]
    assert_same_end(run, runs.whole(**EVERY_STEP))


def test_a_signal_waits_for_the_save_that_is_being_written(runs: Runs, tmp_path: Path) -> None:
    hold, run = _held(runs, tmp_path)
    process = runs.launch(run, ("hold_saves", str(hold)), ("send", 11, "SIGTERM"), **EVERY_STEP)
    process.until(lambda: "saving, then stopping" in process.text)
    assert not process.ended and steps(run) == []
    hold.unlink()
    assert process.wait() == 143
    assert steps(run) == [4, 5]
    runs.run(run, **EVERY_STEP)
    assert_same_end(run, runs.whole(**EVERY_STEP))


@pytest.mark.parametrize("step", [5, 7])
def test_kill_while_a_save_is_written(runs: Runs, tmp_path: Path, step: int) -> None:
    hold, run = _held(runs, tmp_path)
    faults = (("hold_saves", str(hold)), ("send", 2 * step, "SIGKILL"))
    assert runs.launch(run, *faults, **EVERY_STEP).wait() == -9
    assert steps(run) == []
    runs.run(run, **EVERY_STEP)
    assert_same_end(run, runs.whole(**EVERY_STEP))


def test_an_error_elsewhere_does_not_lose_the_save_that_is_being_written(runs: Runs, tmp_path: Path) -> None:
    hold, run = _held(runs, tmp_path)
    process = runs.launch(run, ("hold_saves", str(hold)), ("bad_gradient", 11, 11, "nan"), **EVERY_STEP)
    process.until(lambda: lines(run) and lines(run)[-1]["step"] == 5 if (run / "metrics.jsonl").exists() else False)
    hold.unlink()
    assert process.wait() == 2
    assert steps(run) == [4]
    runs.run(run, **EVERY_STEP)
    assert_same_end(run, runs.whole(**EVERY_STEP))
