"""The embedded default through its command: what it writes, that it goes on where it was stopped, and its claim."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from quietstar.demos import textbook as experiment
from quietstar.train import main

SHORT = [
    "--textbook.pretraining_steps",
    "2",
    "--training.steps",
    "2",
    "--training.eval_every",
    "1",
    "--training.threads",
    "1",
]


@pytest.fixture
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures on 4 texts, for tests that do not look at the numbers."""
    monkeypatch.setattr(experiment, "HELD_OUT_TEXTS", 4)


def measures(directory: Path, seed: int, arm: str) -> dict[str, float]:
    return json.loads((directory / f"seed-{seed}" / arm / "measures.json").read_text())


@pytest.mark.slow
@pytest.mark.usefixtures("few_texts")
def test_a_short_run_writes_table_figure_and_every_arm_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--output_dir", str(tmp_path), *SHORT]
    assert main(words) == 0
    printed = capsys.readouterr().out
    table = (tmp_path / "results.md").read_text()
    assert table in printed
    for row in ("before Quiet-STaR", "Quiet-STaR", "no REINFORCE", "pause tokens", "plain language modelling"):
        assert f"{row} |" in table
    figure = ElementTree.parse(tmp_path / "curves.svg").getroot()
    curves = [len(list(chart.iterfind("*[@class='dots f1']"))) for chart in figure.iter() if chart.get("role") == "img"]
    assert curves == [1] * 5  # of Quiet-STaR in each chart
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["0"]) == {"before", "quietstar", "no_reinforce", "pause", "language_modeling"}

    finished = {file: file.stat().st_mtime_ns for file in tmp_path.glob("seed-*/*/measures.json")}
    assert len(finished) == 5
    assert results["0"]["pause"]["seconds"] > 0
    assert "This command took " in printed
    (tmp_path / "seed-0" / "pause" / "measures.json").unlink()
    (tmp_path / "seed-0" / "pause" / "measures.json.new").write_text("{")  # as if it had been stopped while writing
    assert main([*words, "--training.save_every", "7"]) == 0
    again = {file: file.stat().st_mtime_ns for file in tmp_path.glob("seed-*/*/measures.json")}
    assert {file for file in again if again[file] != finished[file]} == {tmp_path / "seed-0/pause/measures.json"}


@pytest.mark.slow
@pytest.mark.usefixtures("few_texts")
def test_what_other_options_made_is_refused_and_can_be_started_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--output_dir", str(tmp_path), *SHORT, "--textbook.controls", "false"]
    seed = tmp_path / "seed-0"
    assert main(words) == 0
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for key, value, directory, message in (
        ("textbook.useful_asides", "0.5", "base", "textbook.useful_asides was 0.3 and is 0.5"),
        ("textbook.operands", "3", "base", "textbook.operands was '4' and is '3'"),
        ("model.thought_length", "4", "before", "model.thought_length was 8 and is 4"),
        ("objective.policy_weight", "0", "before", "objective.policy_weight was None and is 0.0"),
        ("training.steps", "3", "before", "training.steps was 2 and is 3"),
    ):
        assert main([*words, f"--{key}", value]) == 2
        wanted = (
            f"error: {seed / directory}: was made with other options: {message}. "
            "Set it back, choose another --output_dir, or start over with --training.resume false\n"
        )
        assert capsys.readouterr().err.endswith(wanted)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before

    changed = [*words, "--model.thought_length", "4"]
    assert main([*changed, "--training.resume", "false"]) == 0
    assert len(json.loads((tmp_path / "results.json").read_text())["0"]["quietstar"]["thoughts"]) == 3
    assert json.loads((seed / "quietstar" / "measures.json").read_text())["options"]["model.thought_length"] == 4
    assert main(changed) == 0  # goes on from there
    assert main(words) == 2

    (seed / "base" / "textbook.json").unlink()
    assert main(changed) == 2
    assert f"{seed / 'base'}: was made with other options: it has no textbook.json" in capsys.readouterr().err
    shutil.rmtree(seed / "base")
    (seed / "base.new").mkdir()  # as if it had been stopped while writing
    assert main(changed) == 0
    assert (seed / "base" / "textbook.json").is_file() and not (seed / "base.new").exists()


@pytest.mark.slow
def test_the_claim(tmp_path: Path) -> None:
    """Seed 0 of the published table: from chance to nearly always right, and another text's thought does not help."""
    assert main(["--output_dir", str(tmp_path), "--textbook.controls", "false", "--training.eval_every", "0"]) == 0
    before, after = measures(tmp_path, 0, "before"), measures(tmp_path, 0, "quietstar")
    assert before["nll_talk"] > 1.2 and before["correct_workings"] < 0.45
    assert after["nll_base"] > 1.85  # ln 7 is 1.946: the answer cannot be predicted without thinking
    assert after["nll_talk"] < 0.3
    assert after["accuracy_talk"] > 0.93
    assert after["correct_workings"] > 0.93
    assert after["scrambled_nll"] > 3
