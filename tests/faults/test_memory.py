"""Where memory runs out, the micro-batch halves and the batch stays what it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.runs import Runs, assert_same_end, events, happened, lines, newest, state, steps
from tests.marks import slow


def _assert_close_end(output_dir: Path, whole: Path) -> None:
    """The same to rounding. Another cut of the batch adds up its gradients in another order."""
    ours, theirs = (load_file(newest(run) / "model.safetensors") for run in (output_dir, whole))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)
    for mine, other in zip(lines(output_dir), lines(whole), strict=True):
        assert mine.keys() == other.keys() and mine["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("fault", "step", "held_out"),
    [
        (("no_memory_forward", 1), 0, 0.1),  # found by the evaluation of step 0
        slow(("no_memory_forward", 1), 1, 0),
        (("no_memory_backward", 6, 6), 3, 0.1),
        slow(("no_memory_moments",), 1, 0.1),
    ],
    ids=["evaluation", "forward", "backward", "optimizer"],
)
def test_the_micro_batch_halves_and_the_result_is_the_same(
    runs: Runs, tmp_path: Path, fault: tuple[object, ...], step: int, held_out: float
) -> None:
    text = runs.run(tmp_path, fault, data__validation_fraction=held_out)
    assert happened(tmp_path) == [(step, "out_of_memory")]
    message = next(event["message"] for event in events(tmp_path) if event["event"] == "out_of_memory")
    assert message in text
    assert "with 2 text(s) at a time" in message and "1 at a time from here on; the batch stays 4" in message
    assert state(newest(tmp_path))["micro_batch_size"] == 1
    _assert_close_end(tmp_path, runs.whole(data__validation_fraction=held_out))


def test_the_batch_is_that_of_a_run_with_the_smaller_micro_batch(runs: Runs, tmp_path: Path) -> None:
    """Bitwise: nothing of what was computed before memory ran out has stayed."""
    runs.run(tmp_path, ("no_memory_forward", 1))
    ours, theirs = newest(tmp_path), newest(runs.whole(training__micro_batch_size=1))
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes()


def test_halving_goes_on_as_far_as_it_has_to(runs: Runs, tmp_path: Path) -> None:
    runs.run(tmp_path, ("no_memory_forward", 1), training__micro_batch_size=4)
    assert happened(tmp_path) == [(0, "out_of_memory"), (0, "out_of_memory")]
    _assert_close_end(tmp_path, runs.whole(training__micro_batch_size=4))


def test_the_smaller_micro_batch_survives_a_kill(runs: Runs, tmp_path: Path) -> None:
    """Step 3 starts with micro-batch 5, fails in it, and is done in four; so step 6 ends with micro-batch 21."""
    once = ("no_memory_backward", 5, 5)
    runs.run(tmp_path / "not_killed", once)
    runs.run(tmp_path / "killed", once, ("send", 20, "SIGKILL"), expect=-9)
    runs.run(tmp_path / "killed")
    assert_same_end(tmp_path / "killed", tmp_path / "not_killed")


def test_one_text_that_does_not_fit_ends_with_advice(runs: Runs, tmp_path: Path) -> None:
    text = runs.run(tmp_path, ("no_memory_forward", 0), expect=2, data__validation_fraction=0)
    assert "error: out of memory at step 1 with 1 text(s) at a time" in text and "Traceback" not in text
    assert "can't allocate memory" in text and "training.micro_batch_size" in text and "quietstar.plan" in text
    assert steps(tmp_path) == []


def test_policy_stop(runs: Runs, tmp_path: Path) -> None:
    text = runs.run(tmp_path, ("no_memory_backward", 6, 6), expect=2, training__on_out_of_memory="stop")
    assert "error: out of memory at step 3 with 2 text(s) at a time" in text
    runs.run(tmp_path)
    assert_same_end(tmp_path, runs.whole())


def test_weights_that_may_be_half_changed_are_not_used(runs: Runs, tmp_path: Path) -> None:
    text = runs.run(tmp_path, ("no_memory_optimizer", 3), expect=2)
    assert "while the weights were changing; start again to resume" in text
    assert steps(tmp_path) == [2]
    runs.run(tmp_path)
    assert_same_end(tmp_path, runs.whole())


def test_without_room_for_a_copy_training_waits_for_the_checkpoint(runs: Runs, tmp_path: Path) -> None:
    runs.run(tmp_path, ("no_memory_copy",))
    assert happened(tmp_path) == [(step, "not_copied") for step in (2, 4, 6, 8)]
    assert_same_end(tmp_path, runs.whole())
