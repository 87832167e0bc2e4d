"""The text that `quietstar.evaluate` reads: how long its windows are, and the page of thoughts that lies beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.evaluated import constant_model, evaluate, result, save


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a training run with one checkpoint."""
    directory = tmp_path_factory.mktemp("run")
    (directory / "checkpoints").mkdir()
    save(constant_model({"a": 0.5, "b": 0.25}), directory / "checkpoints" / "last")
    return directory


def measure(run: Path, trained: int | None, out: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report, and the settings of the page of thoughts."""
    (run / "config.yaml").write_text("{}" if trained is None else f"data: {{length: {trained}}}")
    out.mkdir()
    (out / "text.txt").write_text("ab" * 30)
    report = evaluate(run / "checkpoints" / "last", out, text=out / "text.txt", **options)
    return report, json.loads((out / "thoughts.json").read_text())["settings"]


@pytest.mark.parametrize(
    ("trained", "options", "said", "window"),
    [
        (20, {}, "in 3 windows of 20, as in training", 20),
        (20, {"length": 30}, "in 2 windows of 30, as asked for", 30),
        (None, {}, "in 1 windows of 256, by default", 60),
        (5, {}, "in 12 windows of 5, as in training", 6),  # a page needs 6 for the lookahead
        (9999, {}, "in 1 windows of 508, all that the context holds, 9999 as in training", 60),
    ],
)
def test_length(
    trained: int | None, options: dict[str, int], said: str, window: int, run: Path, tmp_path: Path
) -> None:
    report, page = measure(run, trained, tmp_path / "out", **options)
    assert said in result(report, "NLL", "text.txt")["statement"]
    assert (page["window"], page["training_length"]) == (window, trained)


def test_a_page_that_cannot_be_written_does_not_lose_the_evaluation(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "thoughts.html").mkdir(parents=True)
    (tmp_path / "text.txt").write_text("ab" * 30)
    evaluate(run / "checkpoints" / "last", tmp_path / "out", text=tmp_path / "text.txt", length=24)
    assert 'href="thoughts.html"' not in (tmp_path / "out" / "evaluation.html").read_text()
    shown = capsys.readouterr()
    assert "thoughts.html: could not be made: " in shown.err
    assert "NLL" in shown.out


def test_no_path_of_this_machine(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    command = ["quietstar", str(run), "--text", str(out / "text.txt"), f"--output_dir={out}", "--seed", "0"]
    monkeypatch.setattr("sys.argv", command)
    report, _ = measure(run, 20, out)
    assert report["checkpoint"] == f"{run.name}, last"
    assert report["settings"]["text"] == "text.txt"
    assert report["environment"]["command"].endswith(f" {run.name} --text text.txt --output_dir=out --seed 0")
    for name in ("evaluation.json", "evaluation.html", "thoughts.json", "thoughts.html"):
        assert str(run) not in (out / name).read_text()
        assert str(tmp_path) not in (out / name).read_text()
