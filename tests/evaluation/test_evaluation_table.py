"""What the terminal and the page say of results: verdicts, directions, what is left out and why."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from quietstar.evaluation.held_out_text import nll_comparison
from quietstar.reporting.evaluation_page import evaluation_page, evaluation_text, group_table, verdict
from quietstar.statistics.comparison import Comparison, compare
from quietstar.statistics.intervals import Interval


def report(*results: Comparison) -> dict[str, Any]:
    rows = json.loads(json.dumps([one.to_json() for one in results]))
    return {"checkpoint": "tiny", "results": rows, "settings": {}, "tasks": {}, "environment": {}}


@pytest.mark.parametrize(
    ("low", "high", "higher_is_better", "said"),
    [
        (0.1, 0.2, True, "better"),
        (0.1, 0.2, False, "worse"),
        (-0.2, -0.1, True, "worse"),
        (-0.2, -0.1, False, "better"),
        (-0.1, 0.1, True, ""),
        (0.0, 0.1, True, ""),
        (0.1, 0.2, None, ""),
        (None, None, True, ""),
    ],
)
def test_verdicts(low: float | None, high: float | None, higher_is_better: bool | None, said: str) -> None:
    assert verdict({"low": low, "high": high}, higher_is_better) == said


def test_a_difference_is_with_thinking_minus_without_on_the_same_items() -> None:
    """Items differ much and what thinking adds differs little: each side's interval is wide and that of the difference
    is narrow, as the normal approximation of its own spread says."""
    rng = np.random.default_rng(0)
    off, added = rng.normal(0.0, 1.0, 400), rng.normal(0.1, 0.05, 400)
    found = compare("", "", "", off.tolist(), (off + added).tolist(), skipped=0, seed=0)
    assert (found.off.mean, found.on.mean) == pytest.approx((off.mean(), (off + added).mean()))
    assert found.difference.mean == pytest.approx(added.mean())
    for interval, values in ((found.off, off), (found.on, off + added), (found.difference, added)):
        reach = 1.96 * values.std() / np.sqrt(400)
        ends = values.mean() - reach, values.mean() + reach
        assert (interval.low, interval.high) == pytest.approx(ends, abs=0.2 * reach)


def test_tenths_by_the_outcome_have_no_verdict() -> None:
    """A change that lowers every NLL by 0.1 is better in all, in each tenth by entropy and in each kind; in the tenths
    by NLL, where chance alone moves the ends, nothing is said but why."""
    random = np.random.default_rng(0)
    windows = [random.random(40) for _ in range(6)]
    found = nll_comparison(
        [(own, own - 0.1) for own in windows],
        [["word"] * 40] * 6,
        seed=0,
        entropies=[random.random(40) for _ in range(6)],
    )
    content = report(found)
    text, html = evaluation_text(content), evaluation_page(content)
    assert text.count("better\n") == 1 + 10 + 1
    assert html.count("<b>better</b>") == 1 + 10 + 1
    for shown in (text, html):
        assert shown.count("regression to the mean") == 1
        assert "below 0 where thinking lowers a number" in shown
    assert html.count("below 0 thinking helps") == 2
    assert "regression to the mean" in content["results"][0]["caveats"]["difficulty"]
    (row,) = content["results"]
    lines = {kind: group_table(groups, "nats", False) for kind, groups in row["groups"].items()}
    assert {kind: len(cells) for kind, cells in lines.items()} == {
        "difficulty": 10,
        "uncertainty": 10,
        "kind of token": 1,
    }


def test_what_is_left_out_and_numbers_of_any_size() -> None:
    huge, some = Interval(5.25e15, None, None, 3), Interval(2.5, 2.0, 3.0, 3)
    one = Comparison("perplexity", "task", "What it is.", "", 3, 2, some, huge, huge, None, skipped_because="no number")
    text, html = evaluation_text(report(one)), evaluation_page(report(one))
    assert "perplexity, task (2 left out: no number): What it is." in text
    assert "2 (no number)" in html
    assert "5.25e+15" in text and "2.5000 [2.0000, 3.0000]" in text
