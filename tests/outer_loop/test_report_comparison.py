"""Several runs side by side: the same axes, an equal budget, and what differs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from quietstar.errors import DataError
from quietstar.report import main
from quietstar.reporting.comparison_report import print_comparison, write_comparison
from tests.outer_loop.loop_files import GROUPS, VERIFIER, candidates, write_loop_run
from tests.outer_loop.pages import cells, headings, legend, part

WITH, WITHOUT, ALONE = "with <rationalisation>", "without", "answers alone"


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables take the width of the terminal, which the processes of a parallel test run may have one of."""
    monkeypatch.setenv("COLUMNS", "10000")


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """With rationalisation 1.7 completions of a problem and iteration, without 1; one arm has no iterations."""
    out = tmp_path_factory.mktemp("comparison")
    made = {
        WITH: write_loop_run(out / "with #1"),
        WITHOUT: write_loop_run(out / "without", rationalize=False, choosing=candidates()),
        ALONE: write_loop_run(out / "alone", 0),
    }
    summary = json.loads((made[WITH] / "summary.json").read_text())
    for row in summary["iterations"][1:]:
        row["rationalized"]["samples"] = 280
    (made[WITH] / "summary.json").write_text(json.dumps(summary))
    return made


@pytest.fixture(scope="module")
def out(arms: dict[str, Path]) -> Path:
    return arms[WITH].parent


@pytest.fixture(scope="module")
def page(arms: dict[str, Path], out: Path) -> str:
    return write_comparison(out, arms).read_text(encoding="utf-8")


def numbers(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    return found


def test_budgets_are_completions_of_each_problem_so_far(page: str, out: Path) -> None:
    arms = numbers(out)["arms"]
    assert [point["budget"] for point in arms[WITH]["points"]] == pytest.approx([0, 1.7, 3.4, 5.1])
    assert [point["budget"] for point in arms[WITHOUT]["points"]] == [0, 1, 2, 3]
    assert [point["steps"] for point in arms[WITHOUT]["points"]] == [0, 48, 104, 168]
    assert [point["budget"] for point in arms[ALONE]["points"]] == [0]


def test_the_equal_budget_is_the_largest_that_all_have(page: str, out: Path) -> None:
    equal = numbers(out)["equal_budget"]
    assert equal["budget"] == 3
    assert {name: point["iteration"] for name, point in equal["arms"].items()} == {WITH: 1, WITHOUT: 3, ALONE: 0}
    rows = cells(part(page, "At an equal budget"))[1:]
    assert rows[0] == [WITH, "1", "26.7 [23.7, 28.7]", "48", "1.7"]
    assert [row[0] for row in rows] == [WITH, WITHOUT, ALONE]


def test_the_page_has_one_figure_for_all_and_a_panel_for_each(page: str) -> None:
    names = [WITH, WITHOUT, ALONE]
    assert legend(page, "By iteration") == legend(page, "By budget") == names
    assert headings(page, "h3") == ["By iteration", "By budget", *names]
    assert legend(page, "without") == list(GROUPS)
    assert "<rationalisation>" not in page
    levels = re.findall(r'<path class="line s3" d="M[\d.]+ ([\d.]+)L[\d.]+ ([\d.]+)"/>', page)
    assert len(levels) >= 2 and all(first == last for first, last in levels[:2])  # a run without iterations


def test_runs_are_linked_by_relative_addresses(page: str) -> None:
    assert re.findall('<a href="(.*?)">', page) == [
        "with%20%231/report.html",
        "without/report.html",
        "alone/report.html",
    ]


def test_options_that_differ_are_listed(page: str) -> None:
    rows = {row[0]: row[1:] for row in cells(part(page, "What differs"))[1:]}
    assert rows == {"loop.iterations": ["3", "3", "0"], "loop.rationalize": ["true", "false", "true"]}


def test_candidates_stand_side_by_side(page: str) -> None:
    assert cells(part(page, "Choosing among candidates"))[2][0] == f"without: best by {VERIFIER}"


def test_the_terminal_has_the_same_tables(arms: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    print_comparison(arms)
    ends, equal, choices = capsys.readouterr().out.split("\n\n")
    assert ends.splitlines()[-3].split("  ")[0] == WITH and "60.0 [57.0, 62.0]" in ends
    assert "within 3 completions" in equal and "26.7 [23.7, 28.7]" in equal
    assert f"without: best by {VERIFIER}" in choices


def test_the_report_command_writes_it_again(page: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = numbers(out)
    (out / "report.html").unlink()
    assert main([str(out)]) == 0
    assert (out / "report.html").read_text() == page and numbers(out) == before
    assert capsys.readouterr().out.strip() == str(out / "report.html")


def test_other_held_out_problems_are_pointed_out(arms: dict[str, Path], tmp_path: Path) -> None:
    other = write_loop_run(tmp_path / "other", 1, groups=GROUPS[:2])
    page = write_comparison(tmp_path, {"one": arms[WITH], "other": other}).read_text()
    assert "different numbers of held-out problems (one 400, other 200)" in part(page, "Warnings")


def test_runs_without_completions_have_no_budget(arms: dict[str, Path], tmp_path: Path) -> None:
    page = write_comparison(tmp_path, {ALONE: arms[ALONE]}).read_text()
    assert numbers(tmp_path)["equal_budget"] is None and "equal budget" not in page


@pytest.mark.parametrize("missing", [True, False])
def test_what_cannot_be_compared_is_refused(arms: dict[str, Path], tmp_path: Path, missing: bool) -> None:
    with pytest.raises(DataError, match=r"summary\.json" if missing else "got no run"):
        write_comparison(tmp_path, {**arms, "missing": tmp_path} if missing else {})
    assert not list(tmp_path.iterdir())


def test_a_damaged_comparison_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "comparison.json").write_text('{"directories": 3}')
    assert main([str(tmp_path)]) == 2
    assert "comparison.json" in capsys.readouterr().err
