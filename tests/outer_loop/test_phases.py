"""Phases are done once, known by their inputs, and never mistaken for others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quietstar.errors import CheckpointError
from quietstar.outer_loop import phases as module
from quietstar.outer_loop.phases import Phases, key_of
from quietstar.runs.files import EventLog


class Work:
    """Counts how often it is done."""

    def __init__(self) -> None:
        self.keys: list[str] = []

    def __call__(self, key: str) -> dict[str, Any]:
        self.keys.append(key)
        return {"times": len(self.keys)}


def phases(directory: Path, redo: bool = False) -> Phases:
    return Phases(directory, EventLog(directory), redo, lambda text: None)


def test_a_phase_is_done_once(tmp_path: Path) -> None:
    work, inputs = Work(), {"a": 1, "b": [1.5, None, "x"]}
    for _ in range(2):
        ours = phases(tmp_path)
        assert ours.outputs(2, "train") is None
        assert ours.run(2, "train", inputs, work) == ours.outputs(2, "train") == {"times": 1}
    manifest = json.loads((tmp_path / "iteration-02/train.json").read_text())
    assert manifest == {
        "phase": "train",
        "iteration": 2,
        "key": work.keys[0],
        "inputs": {"loop.version": module.LOOP_VERSION, **inputs},
        "outputs": {"times": 1},
    }


def test_other_phases_and_inputs_have_other_keys(tmp_path: Path) -> None:
    work = Work()
    for iteration, name, inputs in ((1, "x", {"a": 1}), (1, "y", {"a": 1}), (2, "x", {"a": 1}), (3, "x", {"a": "1"})):
        phases(tmp_path).run(iteration, name, inputs, work)
    assert len(set(work.keys)) == 4


def test_other_inputs_are_refused_with_a_list(tmp_path: Path) -> None:
    work = Work()
    phases(tmp_path).run(1, "train", {"a": 1, "b": 2, "gone": 3}, work)
    with pytest.raises(CheckpointError) as refused:
        phases(tmp_path).run(1, "train", {"a": 5, "b": 2, "new": 4}, work)
    text = str(refused.value)
    assert f"{tmp_path / 'iteration-01'}: train was done with other inputs" in text and "--loop.redo" in text
    assert "a was 1 and is 5; gone was 3 and is None; new was None and is 4." in text and "b was" not in text
    assert phases(tmp_path, redo=True).run(1, "train", {"a": 5}, work) == {"times": 2}
    assert phases(tmp_path).run(1, "train", {"a": 5}, work) == {"times": 2}


def test_another_version_of_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases(tmp_path).run(1, "train", {}, Work())
    monkeypatch.setattr(module, "LOOP_VERSION", module.LOOP_VERSION + 1)
    with pytest.raises(CheckpointError, match=r"loop\.version was 1 and is 2"):
        phases(tmp_path).run(1, "train", {}, Work())


def test_work_that_fails_leaves_no_manifest(tmp_path: Path) -> None:
    def fail(key: str) -> dict[str, Any]:
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        phases(tmp_path).run(1, "train", {}, fail)
    assert phases(tmp_path).run(1, "train", {}, Work()) == {"times": 1}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"outputs": 3}', b"\xff"])
def test_a_damaged_manifest_is_named(content: bytes, tmp_path: Path) -> None:
    phases(tmp_path).run(1, "train", {}, Work())
    file = tmp_path / "iteration-01/train.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"iteration-01/train\.json: cannot be read .*delete it"):
        phases(tmp_path).run(1, "train", {}, Work())
    file.unlink()
    assert phases(tmp_path).run(1, "train", {}, Work()) == {"times": 1}


def test_keys() -> None:
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    values: list[Any] = [1, 1.5, "1", None, True, [1], {"a": 1}, "\ud800", "\u2028"]
    assert len({key_of({"a": value}) for value in values}) == len(values)
