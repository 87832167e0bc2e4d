"""V-STaR's benchmark puts the numbers of several runs together."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import vstar
from tests.outer_loop.recomputed import answer, by_problem, is_right, lines_of, mean_of_subsets, vote_right

CANDIDATES = 4


@pytest.mark.slow
def test_the_table_holds_what_the_runs_candidates_come_to(tmp_path: Path) -> None:
    """A perfect verifier and the majority over all subsets of the stored candidates, by definition."""
    vstar.main(["--quick", "--output", str(tmp_path / "runs"), "--results", str(tmp_path)])
    problems = by_problem(lines_of(tmp_path / "runs/seed-0", 1, "candidates"))
    assert {len(own) for own in problems.values()} == {CANDIDATES} and len(problems) == 8
    rows = {(row["measure"], int(row["k"])): row for row in csv.DictReader((tmp_path / "vstar.csv").open(newline=""))}
    table = (tmp_path / "vstar.md").read_text()
    shown = {"pass": [], "maj": []}
    for k in (1, 2, 4):
        shares: dict[str, list[float]] = {"pass": [], "maj": []}
        for own in problems.values():
            right = [is_right(line) for line in own]
            said = [answer(line["text"]) for line in own]
            shares["pass"].append(mean_of_subsets(CANDIDATES, k, lambda chosen, r=right: any(r[i] for i in chosen)))
            shares["maj"].append(
                mean_of_subsets(CANDIDATES, k, lambda c, s=said, r=right: vote_right(s, [1.0] * CANDIDATES, r, c))
            )
        for measure, values in shares.items():
            mean = sum(values) / len(values)
            assert float(rows[measure, k]["mean"]) == pytest.approx(mean), (measure, k)
            shown[measure].append(f"{100 * mean:.1f}")
    for name, measure in (("pass@k (a perfect verifier)", "pass"), ("majority vote", "maj")):
        line = next(line for line in table.splitlines() if line.startswith(f"| {name} "))
        assert [cell.strip() for cell in line.split("|")[2:-1]] == shown[measure]
    assert "![Best-of-k](vstar.svg)" in table and "<svg" in (tmp_path / "vstar.svg").read_text()
