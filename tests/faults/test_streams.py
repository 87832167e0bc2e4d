"""Streams give the same texts however often a run is interrupted, and rows that cannot be used follow the policy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.faults.runs import Runs, assert_same_end, happened, lines, newest, state, steps
from tests.faults.shards import KINDS, stream_options


@pytest.mark.parametrize("kind", KINDS)
def test_kill_and_resume(runs: Runs, tmp_path: Path, shards: Path, kind: str) -> None:
    """In step 2 before any checkpoint, and in the first micro-batch of steps 4 and 7."""
    options = stream_options(shards, kind)
    for micro_batch in (3, 7, 5):
        assert runs.launch(tmp_path, ("send", micro_batch, "SIGKILL"), **options).wait() == -9
    runs.run(tmp_path, **options)
    assert_same_end(tmp_path, runs.whole(**options))
    assert state(newest(tmp_path))["position"]


@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_resume_at_any_step(runs: Runs, tmp_path: Path, shards: Path, step: int) -> None:
    """With another number of workers, which read ahead of what is trained on."""
    options = stream_options(shards, "parquet")
    run = runs.stopped_after(step, tmp_path / "run", **options)
    runs.run(run, **options | {"data__workers": 1})
    assert_same_end(run, runs.whole(**options))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_inside_an_accumulation(runs: Runs, tmp_path: Path, shards: Path, workers: int) -> None:
    """The texts of the step that was begun are read again."""
    options = stream_options(shards, "jsonl.gz") | {"data__workers": workers}
    runs.run(tmp_path, ("send", 7, "SIGTERM"), expect=143, **options)
    assert steps(tmp_path) == [2, 3]
    runs.run(tmp_path, **options)
    assert_same_end(tmp_path, runs.whole(**options))


def test_rollback(runs: Runs, tmp_path: Path, shards: Path) -> None:
    options = stream_options(shards, "parquet") | {"training__on_non_finite": "rollback"}
    runs.run(tmp_path, ("bad_gradient", 8, 8, "nan"), **options)
    assert happened(tmp_path) == [(4, "rollback")]
    assert_same_end(tmp_path, runs.whole(**options))


@pytest.mark.parametrize("missing", ["state.json", "optimizer.safetensors"])
def test_a_checkpoint_that_does_not_know_its_place(runs: Runs, tmp_path: Path, shards: Path, missing: str) -> None:
    options = stream_options(shards, "jsonl")
    run = runs.stopped_after(3, tmp_path / "run", **options)
    for step in (1, 2):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    (newest(run) / missing).unlink()
    assert f"{missing} is missing" in runs.run(run, expect=2, **options)
    assert f"without {missing}" in runs.run(run, training__allow_partial="true", **options)
    assert state(newest(run))["step"] == 8


def test_other_shards_are_another_run(runs: Runs, tmp_path: Path, shards: Path) -> None:
    copy, run = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(shards, copy)
    options = stream_options(copy, "jsonl")
    runs.run(run, ("send", 9, "SIGTERM"), expect=143, **options)
    with (copy / "jsonl" / "1.jsonl").open("a") as file:
        file.write(json.dumps({"text": "1+1=2,2+2=4"}) + "\n")
    assert "belongs to another run: the training data's" in runs.run(run, expect=2, **options)


BAD = b'{"text": "1+1=2\n'


@pytest.fixture
def bad_shards(shards: Path, tmp_path: Path) -> Path:
    """With a broken line in the second shard, and two bytes that are no UTF-8 in the third."""
    copy = tmp_path / "bad"
    shutil.copytree(shards, copy)
    for name, line in (("1.jsonl", BAD), ("2.jsonl", b'{"text": "1\xff+\xfe1"}\n')):
        rows = (copy / "jsonl" / name).read_bytes().splitlines(keepends=True)
        (copy / "jsonl" / name).write_bytes(b"".join([*rows[:4], line, *rows[4:]]))
    return copy


def test_a_bad_row_stops_the_run(runs: Runs, tmp_path: Path, bad_shards: Path) -> None:
    text = runs.run(tmp_path / "run", expect=2, **stream_options(bad_shards, "jsonl"))
    assert f"error: {bad_shards}/jsonl/" in text and ":5: not " in text and "Traceback" not in text


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_rows_are_counted_once_however_often_a_run_is_killed(
    runs: Runs, tmp_path: Path, bad_shards: Path, workers: int
) -> None:
    options = stream_options(bad_shards, "jsonl") | {"data__on_bad_row": "skip", "data__workers": workers}
    run = tmp_path / "run"
    for micro_batch in (3, 9, 5):
        assert runs.launch(run, ("send", micro_batch, "SIGKILL"), **options).wait() == -9
    text = runs.run(run, **options)
    assert ":5: not " in text
    whole = tmp_path / "whole"
    runs.run(whole, **options)
    assert_same_end(run, whole)
    assert lines(whole)[-1]["skipped_rows"] >= 2


def test_skipping_is_capped(runs: Runs, tmp_path: Path, bad_shards: Path) -> None:
    options = stream_options(bad_shards, "jsonl") | {"data__on_bad_row": "skip", "data__max_bad_rows": 1}
    text = runs.run(tmp_path / "run", expect=2, **options)
    assert "error: 2 rows cannot be used, more than data.max_bad_rows allows (1)" in text


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_bad_rows_of_files_in_memory(runs: Runs, tmp_path: Path, policy: str) -> None:
    file, run = tmp_path / "text.jsonl", tmp_path / "run"
    rows = (runs.inputs / "text.jsonl").read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*rows[:3], BAD, *rows[3:]]))
    text = runs.run(run, expect=2 if policy == "stop" else 0, data__path=file, data__on_bad_row=policy)
    assert f"{file}:4: not valid JSON" in text
    if policy == "skip":
        assert [line["skipped_rows"] for line in lines(run) if line["split"] == "train"] == [1, 1, 1]
        theirs = newest(runs.whole())
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert (newest(run) / name).read_bytes() == (theirs / name).read_bytes()
