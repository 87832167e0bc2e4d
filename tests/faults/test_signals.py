"""SIGTERM and SIGINT save and stop, a second one stops at once, SIGUSR1 saves; SIGSTOP changes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from quietstar.data.batches import Batch
from quietstar.errors import Interrupted
from quietstar.training.step import StepResult
from tests.faults.launch import REPOSITORY, TIMEOUT
from tests.faults.runs import STEPS, Runs, arguments, assert_same_end, events, happened, lines, newest, steps
from tests.training.helpers import language_modeling_step, options, trainer

FIRST_OF_STEP_4 = 7
LAST_OF_STEP_4 = 8


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_saves_and_stops(runs: Runs, tmp_path: Path, name: str, status: int) -> None:
    text = runs.run(tmp_path, ("send", LAST_OF_STEP_4 - 2, name), expect=status)
    assert f"{name}: saving, then stopping" in text and "Traceback" not in text
    assert steps(tmp_path) == [2, 3]
    assert events(tmp_path)[-1]["event"] == "interrupted" and str(newest(tmp_path)) in events(tmp_path)[-1]["message"]
    runs.run(tmp_path)
    assert_same_end(tmp_path, runs.whole())


def test_a_signal_inside_an_accumulation_leaves_the_step_to_the_next_run(runs: Runs, tmp_path: Path) -> None:
    runs.run(tmp_path, ("send", FIRST_OF_STEP_4, "SIGTERM"), expect=143)
    assert steps(tmp_path) == [2, 3]
    runs.run(tmp_path)
    assert_same_end(tmp_path, runs.whole())


def test_a_signal_in_the_first_step_leaves_nothing_to_resume(runs: Runs, tmp_path: Path) -> None:
    runs.run(tmp_path, ("send", 1, "SIGTERM"), expect=143)
    assert steps(tmp_path) == []
    assert "no step was finished" in events(tmp_path)[-1]["message"]
    runs.run(tmp_path)
    assert_same_end(tmp_path, runs.whole())


@pytest.mark.parametrize(("names", "status"), [(("SIGTERM", "SIGTERM"), 143), (("SIGTERM", "SIGINT"), 130)])
def test_a_second_signal_stops_at_once(runs: Runs, tmp_path: Path, names: tuple[str, ...], status: int) -> None:
    runs.run(tmp_path, ("send", LAST_OF_STEP_4 - 2, *names), expect=status)
    assert steps(tmp_path) in ([], [2])  # the save of step 2 may still have been going on
    runs.run(tmp_path)
    assert_same_end(tmp_path, runs.whole())


def test_a_second_signal_does_not_wait_for_the_save_of_the_first(runs: Runs, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    run = tmp_path / "run"
    process = runs.launch(run, ("hold_saves", str(hold)), ("send", LAST_OF_STEP_4, "SIGTERM"))
    process.until(lambda: "saving, then stopping" in process.text)
    process.send("SIGTERM")
    assert process.wait() == 143
    assert steps(run) == []
    runs.run(run)
    assert_same_end(run, runs.whole())


def test_sigusr1_saves_and_goes_on(runs: Runs, tmp_path: Path) -> None:
    runs.run(tmp_path, ("send", LAST_OF_STEP_4 - 3, "SIGUSR1"), training__keep_checkpoints=9)
    assert steps(tmp_path) == [2, 3, 4, 6, 8]
    assert_same_end(tmp_path, runs.whole())
    assert happened(tmp_path) == [(3, "saved")]


def test_a_stopped_and_continued_process_goes_on(runs: Runs, tmp_path: Path) -> None:
    """The clocks have gone on without it."""
    gate, run = tmp_path / "gate", tmp_path / "run"
    process = runs.launch(run, ("pause", FIRST_OF_STEP_4, str(gate)))
    process.until(gate.exists)
    process.send("SIGSTOP")
    process.until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    gate.unlink()
    before = (run / "metrics.jsonl").stat().st_size
    time.sleep(0.2)
    assert (run / "metrics.jsonl").stat().st_size == before and not process.ended
    process.send("SIGCONT")
    assert process.wait() == 0
    assert_same_end(run, runs.whole())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGKILL", -9)])
def test_the_command_as_a_user_starts_it(runs: Runs, tmp_path: Path, name: str, status: int) -> None:
    """Not forked from another process: it imports everything itself."""
    words = [sys.executable, "-m", "quietstar.train", *arguments(runs.inputs, tmp_path, **LONG)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": runs.zygote.python_path}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(words, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + TIMEOUT
            while not (tmp_path / "metrics.jsonl").exists() or not lines(tmp_path)[1:]:
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.01)
            process.send_signal(signal.Signals[name])
            assert process.wait(TIMEOUT) == status, (tmp_path / "log").read_text()
        finally:
            process.kill()
    assert lines(tmp_path)[-1]["step"] < LONG["training__steps"]
    runs.run(tmp_path, **LONG)
    assert_same_end(tmp_path, runs.whole(**LONG))


LONG: dict[str, Any] = {"training__steps": 3 * STEPS, "training__log_every": 1, "training__eval_every": 12}


@pytest.mark.parametrize("fails", [False, True])
def test_handlers_are_as_before(tmp_path: Path, fails: bool) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    ignored = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    before = [signal.getsignal(number) for number in numbers]

    def interrupt(model: Any, batch: Batch, seed: int) -> StepResult:
        signal.raise_signal(signal.SIGTERM)
        if fails:
            raise KeyError("of the step's own")
        return language_modeling_step(model, batch, seed)

    try:
        with pytest.raises(KeyError if fails else Interrupted) as stopped:
            trainer(tmp_path, compute_step=interrupt, options_=options()).run()
        assert fails or (stopped.value.code == 143 and stopped.value.saved)
        assert [signal.getsignal(number) for number in numbers] == before
    finally:
        signal.signal(signal.SIGUSR1, ignored)
