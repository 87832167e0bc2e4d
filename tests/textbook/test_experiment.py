"""The embedded default through its command: what it writes, that it goes on where it was stopped, and its claim."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quietstar.train import main

SHORT = ["--textbook.pretraining_steps", "2", "--training.steps", "2", "--training.eval_every", "1"]


def measures(directory: Path, seed: int, arm: str) -> dict[str, float]:
    return json.loads((directory / f"seed-{seed}" / arm / "measures.json").read_text())


@pytest.mark.slow
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
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["0"]) == {"before", "quietstar", "no_reinforce", "pause", "language_modeling"}

    finished = {file: file.stat().st_mtime_ns for file in tmp_path.glob("seed-*/*/measures.json")}
    assert len(finished) == 5
    (tmp_path / "seed-0" / "pause" / "measures.json").unlink()
    assert main(words) == 0
    again = {file: file.stat().st_mtime_ns for file in tmp_path.glob("seed-*/*/measures.json")}
    assert {file for file in again if again[file] != finished[file]} == {tmp_path / "seed-0/pause/measures.json"}


@pytest.mark.slow
def test_the_claim(tmp_path: Path) -> None:
    """Seed 0 of the published table: from chance to nearly always right, and another text's thought does not help."""
    assert main(["--output_dir", str(tmp_path), "--textbook.controls", "false", "--training.eval_every", "50"]) == 0
    before, after = measures(tmp_path, 0, "before"), measures(tmp_path, 0, "quietstar")
    assert before["nll_talk"] > 1.2 and before["correct_workings"] < 0.45
    assert after["nll_base"] > 1.85  # ln 7 is 1.946: the answer cannot be predicted without thinking
    assert after["nll_talk"] < 0.3
    assert after["accuracy_talk"] > 0.93
    assert after["correct_workings"] > 0.93
    assert after["scrambled_nll"] > 3
