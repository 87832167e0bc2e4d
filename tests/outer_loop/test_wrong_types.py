"""Files of a loop with values of wrong types: one line that names the file and the field."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from quietstar.errors import CheckpointError, DataError
from quietstar.outer_loop.phases import Phases
from quietstar.report import main
from quietstar.reporting.comparison_report import compared_before
from quietstar.reporting.loop_files import read_summary
from quietstar.runs.files import EventLog
from quietstar.verifiers.training import FORMAT, read_description
from tests.outer_loop.loop_files import candidates, write_loop_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_loop_run(tmp_path_factory.mktemp("runs") / "vstar", rationalize=True, choosing=candidates())


def changed(content: Any, path: str, value: Any) -> None:
    *outer, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    for part in outer:
        content = content[part]
    content[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(("iterations.1.iteration", value) for value in ("1", None, 1.5, [1])),
        *(("iterations.1.held_out", value) for value in (3, None, [])),
        *(("iterations.1.held_out.accuracy", value) for value in ("0.5", [0.5], True)),
        *(("iterations.1.held_out.by_group", value) for value in (["a"], {"a": "b"})),
        *(("iterations.1.sampled.solved", value) for value in ("3", 1.5)),
        *(("iterations.1.built.kept", value) for value in ("3", {})),
        *(("iterations.1.trained.steps", value) for value in ("3", [])),
        *(("iterations.1.distinct", value) for value in (3, {}, {"mean": "x"})),
        *(("warnings", value) for value in ("x", [3], {})),
        *(("candidates", value) for value in (3, [], {})),
        *(("candidates.rows", value) for value in (3, [3], [{}])),
        *(("candidates.rows.0.k", value) for value in ("1", None)),
        *(("candidates.rows.0.value", value) for value in (0.5, {"mean": None})),
        *(("candidates.differences", value) for value in ({}, [[]])),
        *(("candidates.calibration", value) for value in ([], {"x": 3})),
        *(("candidates.discrimination", value) for value in ("x", {"x": {}})),
    ],
)
def test_a_summary(run: Path, tmp_path: Path, path: str, value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A text for a number ended the page in a traceback, after a run of hours."""
    place = Path(shutil.copytree(run, tmp_path / "run"))
    read_summary(place)
    file = place / "summary.json"
    content = json.loads(file.read_text())
    changed(content, path, value)
    file.write_text(json.dumps(content))
    assert main([str(place)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert f"{file}: " in lines[0]
    assert path.split(".")[-1] in lines[0] or path.rpartition(".")[0].replace(".1", "[1]") in lines[0]


@pytest.mark.parametrize(
    "content",
    [
        3,
        [],
        {},
        {"equal_budget": None, "directories": []},
        {"equal_budget": None, "directories": {"a": 3}},
        {"equal_budget": 3, "directories": {}},
        {"equal_budget": {"budget": "x", "asked": True}, "directories": {}},
        {"equal_budget": {"budget": 1.0, "asked": "x"}, "directories": {}},
    ],
)
def test_a_comparison(tmp_path: Path, content: Any) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"comparison\.json: cannot be read \(comparison"):
        compared_before(tmp_path)
    right = {"equal_budget": {"budget": 2, "asked": True}, "directories": {"a": "../a"}, "more": 3}
    (tmp_path / "comparison.json").write_text(json.dumps(right))
    assert compared_before(tmp_path) == ({"a": tmp_path / "../a"}, 2)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([], "manifest.outputs"),
        ("x", "manifest.outputs"),
        ({"key": 3}, "outputs.key"),
        ({"sha256": None}, "outputs.sha256"),
        ({"model_sha256": ["x"]}, "outputs.model_sha256"),
        ({}, "outputs.model_sha256 is missing"),
        ({"key": "x", "more": 3}, "outputs.model_sha256 is missing"),
    ],
)
def test_the_outputs_of_a_phase(tmp_path: Path, outputs: Any, message: str) -> None:
    """A missing hash was a KeyError of the phase that reads it."""

    def train(phases: Phases) -> str:
        return str(phases.run(1, "train", {"steps": 3}, lambda _: {"model_sha256": "abc"})["model_sha256"])

    def phases() -> Phases:
        return Phases(tmp_path, EventLog(tmp_path), False, lambda _: None)

    assert train(phases()) == train(phases()) == "abc"
    file = tmp_path / "iteration-01" / "train.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"outputs": outputs}))
    with pytest.raises(CheckpointError, match=message) as caught:
        train(phases())
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("format", value) for value in ("1", None, [1])),
        *(("kind", value) for value in (3, ["dpo"])),
        *(("beta", value) for value in ("x", None)),
        *(("score", value) for value in (3, {})),
        *(("files", value) for value in ([], {"a.safetensors": 3}, {"a.safetensors": {"size": "3", "sha256": "x"}})),
        *(("files", {name: {"size": 3, "sha256": "x"}}) for name in ("../a.safetensors", "/a.safetensors", "a.bin")),
        *(("tokenizer", value) for value in (3, [])),
        *(("reference", value) for value in ("x", {}, {"path": 3, "fingerprint": "x"})),
    ],
)
def test_the_description_of_a_verifier(tmp_path: Path, field: str, value: Any) -> None:
    right = {"format": FORMAT, "kind": "dpo", "beta": 0.1, "score": "sum", "files": {}, "tokenizer": {}, "more": 3}
    (tmp_path / "verifier.json").write_text(json.dumps(right))
    assert read_description(tmp_path) == right
    (tmp_path / "verifier.json").write_text(json.dumps(right | {field: value}))
    with pytest.raises(CheckpointError, match=rf"verifier\.json: .*{field}"):
        read_description(tmp_path)
