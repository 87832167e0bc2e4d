"""NaN and infinity are found before the weights change, whatever they come from."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from quietstar.training.metrics import read_metrics
from tests.faults.runs import Runs, assert_same_end, happened, lines, newest, steps
from tests.marks import slow

FIRST_OF_STEP_3 = 5
LAST_OF_STEP_3 = 6

SOURCES = {
    "loss": ("bad_state", FIRST_OF_STEP_3, FIRST_OF_STEP_3, 1, "nan"),
    "infinite loss": ("bad_state", LAST_OF_STEP_3, LAST_OF_STEP_3, 1, "inf"),
    "logits of a thought": ("bad_state", FIRST_OF_STEP_3, FIRST_OF_STEP_3, 6, "nan"),
    "infinite logits of a thought": ("bad_state", LAST_OF_STEP_3, LAST_OF_STEP_3, 6, "inf"),
    "gradient": ("bad_gradient", LAST_OF_STEP_3, LAST_OF_STEP_3, "nan"),
    "infinite gradient": ("bad_gradient", FIRST_OF_STEP_3, FIRST_OF_STEP_3, "inf"),
}
"""The third normalised state of a pass is the last one: the sixth is that of the first token of every thought."""


@pytest.mark.parametrize("source", [slow(one) if one.startswith("infinite") else one for one in SOURCES])
def test_stop(runs: Runs, tmp_path: Path, source: str) -> None:
    """The default. The same command again meets no fault and ends as ever, so nothing of the bad step has stayed."""
    text = runs.run(tmp_path, SOURCES[source], expect=2)
    assert "error: step 3: " in text and "Traceback" not in text
    assert "gradient_norm is" in text if "gradient" in source else "(micro-batch" in text
    assert steps(tmp_path) == [2]
    batch = json.loads((tmp_path / "non_finite" / "step-00000003.json").read_text())
    assert len(batch["texts"]) == 4 and batch["problem"] in text
    assert load_file(tmp_path / "non_finite" / "step-00000003.safetensors")["tokens"].shape == (4, 12)
    assert happened(tmp_path) == [(3, "non_finite")]
    runs.run(tmp_path)
    assert_same_end(tmp_path, runs.whole())


@pytest.mark.parametrize("source", ["loss", "gradient"])
def test_skip(runs: Runs, tmp_path: Path, source: str) -> None:
    """The weights of step 3 are those of step 2, and no metric shows the step as 0."""
    options = {"training__on_non_finite": "skip", "training__save_every": 1, "training__log_every": 1}
    fault: Sequence[object] = SOURCES[source]
    runs.run(tmp_path, fault, training__keep_checkpoints=9, **options)
    before, after = (tmp_path / "checkpoints" / f"step-0000000{step}" for step in (2, 3))
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (before / file).read_bytes() == (after / file).read_bytes()
    (line,) = [line for line in read_metrics(tmp_path / "metrics.jsonl", "train") if line["step"] == 3]
    assert math.isnan(line["loss"]) and line["skipped_steps"] == 1 and "gradient_norm" not in line
    assert happened(tmp_path) == [(3, "skipped")]
    assert len(lines(tmp_path)) == len(lines(runs.whole(training__log_every=1)))


def test_a_skipped_step_is_left_out_of_the_means(runs: Runs, tmp_path: Path) -> None:
    runs.run(tmp_path, SOURCES["loss"], training__on_non_finite="skip")
    line = next(line for line in lines(tmp_path) if line["step"] == 3 and line["split"] == "train")
    assert line["skipped_steps"] == 1 and 2 < line["loss"] < 3


def test_skipping_is_bounded_and_the_count_survives_a_kill(runs: Runs, tmp_path: Path) -> None:
    options = {"training__on_non_finite": "skip", "training__max_non_finite": 4, "training__save_every": 1}
    forever = ("bad_gradient", FIRST_OF_STEP_3, 99, "nan")
    runs.run(tmp_path, forever, ("send", 10, "SIGKILL"), expect=-9, **options)
    assert max(steps(tmp_path)) in (3, 4)  # the save of step 4 may not have ended
    text = runs.run(tmp_path, ("bad_gradient", 1, 99, "nan"), expect=2, **options)
    assert "error: step 6: " in text and "; 4 such steps one after another; stopped" in text
    assert max(steps(tmp_path)) == 5


def test_rollback_gives_the_step_a_second_try(runs: Runs, tmp_path: Path) -> None:
    """What was a passing fault leaves no trace in weights and metrics."""
    runs.run(tmp_path, ("bad_gradient", 7, 7, "nan"), training__on_non_finite="rollback")
    assert happened(tmp_path) == [(4, "rollback")]
    assert_same_end(tmp_path, runs.whole())


def test_rollback_once_and_then_skip(runs: Runs, tmp_path: Path) -> None:
    """Step 4 fails in micro-batch 8; back at step 2 it comes again as micro-batches 11 and 12."""
    faults = (("bad_gradient", 8, 8, "nan"), ("bad_gradient", 12, 12, "nan"))
    runs.run(tmp_path, *faults, training__on_non_finite="rollback")
    assert happened(tmp_path) == [(4, "rollback"), (4, "skipped")]
    skipped = tmp_path.with_name("skipped")
    runs.run(skipped, ("bad_gradient", 8, 8, "nan"), training__on_non_finite="skip")
    assert (newest(tmp_path) / "model.safetensors").read_bytes() == (newest(skipped) / "model.safetensors").read_bytes()
    assert lines(tmp_path) == lines(skipped)


def test_without_a_checkpoint_rollback_skips(runs: Runs, tmp_path: Path) -> None:
    runs.run(tmp_path, ("bad_gradient", 2, 2, "nan"), training__on_non_finite="rollback")
    assert happened(tmp_path) == [(1, "skipped")]
