"""STaR's benchmark puts the numbers of several runs together."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from benchmarks import star
from tests.outer_loop.recomputed import accuracy, lines_of


def test_mean_error_and_interval_of_two_seeds() -> None:
    """Half the difference, and 12.706 times that: Student's t for one degree of freedom."""
    assert star.shown([40.0, 60.0]) == "50.0 ± 10.0 [-77.1, 177.1]"
    assert star.shown([40.0]) == "40.0"


@pytest.mark.slow
def test_the_tables_hold_what_the_runs_stores_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--quick", "--regimes", "default", "--output", str(tmp_path / "runs"), "--results", str(tmp_path)]
    star.main(words)
    rows = list(csv.DictReader((tmp_path / "star.csv").open(newline="")))
    table = (tmp_path / "star.md").read_text()
    run = tmp_path / "runs/default/seed-0"
    for arm, iterations in (("with-rationalisation", 2), ("without-rationalisation", 2), ("answers-alone", 1)):
        own = [row for row in rows if (row["arm"], row["group"]) == (arm, "all")]
        assert [row["iteration"] for row in own] == [str(i) for i in range(iterations)]
        found = [float(row["held_out_accuracy"]) for row in own]
        for iteration, share in enumerate(found):
            lines = lines_of(run / arm, iteration, "evaluate")
            assert len(lines) == 8
            if arm == "answers-alone":  # it writes no `>` before the sum
                right = [line["text"] == f"{sum(map(int, line['problem'].split('+')))}." for line in lines]
                assert share == pytest.approx(sum(right) / 8)
            else:
                assert share == pytest.approx(accuracy(lines))
        cells = " | ".join(f"{100 * share:.1f}".rjust(3) for share in found)
        assert f"| 0    | {star.ARMS[arm].ljust(13)} | {cells} |" in table
    assert table.split("\n## ")[1].split("\n![")[0].strip() in capsys.readouterr().out
    assert "![accuracy by iteration](star.svg)" in table and "<svg" in (tmp_path / "star.svg").read_text()

    done = json.loads((run / "comparison.json").read_text())
    star.main(words)  # what is finished is kept
    assert "== " not in capsys.readouterr().out and done == json.loads((run / "comparison.json").read_text())
