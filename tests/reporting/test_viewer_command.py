"""`python -m quietstar.view`, and the report that links to its page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from quietstar.reporting.train_report import write_report
from quietstar.view import main
from tests.reporting.run_files import lines, write_run
from tests.reporting.view_models import of_characters

SUMS = "2+6+4+3=1\n" * 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run with a checkpoint and a text."""
    place = tmp_path_factory.mktemp("runs")
    directory = write_run(place / "run", lines(10), **{"data.length": 20})
    model, tokenizer = of_characters()
    model.save_pretrained(directory / "checkpoints" / "step-00000010")
    tokenizer.save_pretrained(directory / "checkpoints" / "step-00000010")
    (place / "sums.txt").write_text(SUMS)
    return directory


def test_the_page_of_a_run_and_its_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write_report(run).read_text(encoding="utf-8")
    assert "python -m quietstar.view" in before and "href" not in before
    checkpoint, text = run / "checkpoints" / "step-00000010", run.parent / "sums.txt"
    assert main([str(checkpoint), "--text", str(text), "--tokens", "30", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert said.out.split() == [str(run / "thoughts.html"), str(run / "report.html")]
    assert "sums.txt: the text continues; only its first 30 tokens are shown (--tokens)" in said.err
    content = json.loads((run / "thoughts.json").read_bytes())
    assert content["title"] == "sums.txt · thoughts of run, step-00000010"
    assert (content["settings"]["window"], content["settings"]["training_length"]) == (20, 20)
    assert len(content["text"]["tokens"]) == 30
    assert '<a href="thoughts.html">thoughts.html</a>' in (run / "report.html").read_text(encoding="utf-8")


def test_a_model_outside_of_a_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run / "checkpoints" / "step-00000010", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    options = ["--thoughts", "1", "--top_k", "2", "--positions", "every:5", "--seed", "3", "--dtype", "float64"]
    assert main(["model", "--text", str(run.parent / "sums.txt"), "--device", "cpu", *options]) == 0
    content = json.loads((tmp_path / "thoughts.json").read_bytes())
    assert content["model"]["name"] == "model" and content["settings"]["dtype"] == "float64"
    assert [position["token"] for position in content["positions"]] == list(range(1, len(SUMS), 5))
    assert len(content["positions"][0]["thoughts"]) == 1 and len(content["positions"][0]["before"]) == 2
    elsewhere = tmp_path / "pages" / "sums.html"
    assert main(["model", "--text", str(run.parent / "sums.txt"), "--out", str(elsewhere), "--greedy"]) == 0
    assert sorted(file.name for file in elsewhere.parent.iterdir()) == ["sums.html", "sums.json"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--tokens", "0"], "tokens: got 0"),
        (["--out", "{place}"], "is a directory, needs the name of a page"),
        (["--out", "{place}/thoughts.json"], "is the name of the data, needs the name of a page"),
        (["--out", "{place}/sums.txt/page.html"], "out: cannot write to"),
        (["--text", "{place}/none.txt"], "none.txt: no such file or directory"),
        (["--positions", "odd"], "positions: got 'odd'"),
        (["--window", "500"], "window: got 500"),
    ],
)
def test_bad_input_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    given = [argument.format(place=run.parent) for argument in arguments]
    checkpoint = str(run / "checkpoints" / "step-00000010")
    assert main([checkpoint, "--text", str(run.parent / "sums.txt"), "--device", "cpu", *given]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and problem in said


def test_a_language_model_has_no_thoughts_to_show(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", lines(3), **{"training.method": "language_modeling"})
    assert "quietstar.view" not in write_report(directory).read_text(encoding="utf-8")
