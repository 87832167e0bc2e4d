"""The page of a comparison: accuracy by iteration and by budget of completions, and the groups of each run."""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quietstar.outer_loop.report_arms import BUDGET, Table, budget_note, choices, compare, ends, equal
from quietstar.outer_loop.report_charts import PER_CENT, accuracy_curve, chart_panel, group_curves, look
from quietstar.outer_loop.report_files import LoopRun
from quietstar.outer_loop.report_table import Row
from quietstar.reporting.page import page, panels, section, table, warning_list
from quietstar.reporting.run_facts import flatten, machines, shown
from quietstar.reporting.text import visible
from quietstar.reporting.train_report import REPORT

OWN = frozenset({"output_dir", "preset"})
"""Options that differ between runs as a matter of course."""


def comparison_page(
    title: str, runs: Mapping[str, LoopRun], places: Mapping[str, str], budget: float | None = None
) -> str:
    """The page of a comparison.

    Args:
        title: Of the page.
        runs: By name.
        places: Directory of each, relative to that of the page.
        budget: As for `compare`.
    """
    compared = compare(runs, budget)
    head, rows = ends(compared)
    cells = [[_link(row[0], places[row[0]]), *map(visible, row[1:])] for row in rows]
    warnings = [f"{name}: {warning}" for name, run in runs.items() for warning in run.summary.get("warnings", ())]
    return page(
        f"{title} · comparison",
        [
            f'<header><h1>{visible(title)}</h1><p class="lede">{visible(" · ".join(runs))}</p></header>',
            section("Warnings", [warning_list([*_other_problems(compared), *warnings])]),
            section(
                "Held-out accuracy",
                [panels(_accuracy(compared)), table(cells, head, numbers=True)],
                "Greedy, per cent, with 95 % intervals over problems. Steps of fine-tuning and completions sampled, "
                "hinted ones too, are those of all iterations.",
            ),
            section(
                "At an equal budget",
                [_plain_table(equal(compared))],
                budget_note(compared),
            ),
            section(
                "By group",
                [panels(_groups(runs))],
                "Held-out accuracy in per cent of each group of problems, one panel for each run.",
            ),
            section(
                "Choosing among candidates",
                [_plain_table(choices(runs))],
                "One of k candidates for each held-out problem, per cent right, with 95 % intervals over problems.",
            ),
            section("What differs", [_differing(runs)], "Options whose values are not the same in all runs."),
            machines(list(runs.values())[-1].files.environment),
            "<footer>Written by quietstar from the files of the runs; point at a chart for its numbers.</footer>",
        ],
    )


def _accuracy(compared: Mapping[str, Any]) -> list[str]:
    points = {name: arm["points"] for name, arm in compared["arms"].items() if arm["points"]}
    drawn = []
    for title, note, key, label in (
        ("By iteration", "0 is before the first iteration.", "iteration", "iteration"),
        ("By budget", "Completions sampled so far of each training problem drawn.", "budget", BUDGET),
    ):
        end = max((point[key] for own in points.values() for point in own), default=0)
        series = [
            accuracy_curve(
                *_stretched([point[key] for point in own], [{"held_out": point} for point in own], end),
                name,
                **look(place),
            )
            for place, (name, own) in enumerate(points.items())
        ]
        flat = " A run without iterations is a level line." if any(len(own) == 1 for own in points.values()) else ""
        text = f"{note} Shaded: 95 % interval over problems.{flat}"
        drawn.append(chart_panel(title, text, series, x_label=label, x_range=(0, end), y_scale=PER_CENT))
    return drawn


def _stretched(x: list[float], rows: list[Row], end: float) -> tuple[Any, list[Row]]:
    """A curve's points; a single one as a level line."""
    if len(x) == 1 and end > x[0]:
        x, rows = [x[0], end], rows * 2
    return np.array(x, float), rows


def _groups(runs: Mapping[str, LoopRun]) -> list[str]:
    end = float(max(row["iteration"] for run in runs.values() for row in run.rows))
    drawn = []
    for name, run in runs.items():
        x, rows = _stretched([row["iteration"] for row in run.rows], list(run.rows), end)
        axes: dict[str, Any] = {"x_label": "iteration", "x_range": (0.0, end), "y_scale": PER_CENT}
        drawn.append(chart_panel(name, "", group_curves(x, rows), **axes))
    return drawn


def _other_problems(compared: Mapping[str, Any]) -> list[str]:
    counts = {name: arm["points"][-1]["problems"] for name, arm in compared["arms"].items() if arm["points"]}
    if len(set(counts.values())) < 2:
        return []
    found = ", ".join(f"{name} {count}" for name, count in counts.items())
    return [f"The runs have different numbers of held-out problems ({found}); their accuracies are not comparable"]


def _differing(runs: Mapping[str, LoopRun]) -> str:
    flat = {name: flatten(run.files.config) for name, run in runs.items()}
    keys = {key: None for options in flat.values() for key in options if key not in OWN}
    rows = [
        [visible(key), *(shown(options[key]) if key in options else "" for options in flat.values())]
        for key in keys
        if len({repr(options.get(key)) for options in flat.values()}) > 1
    ]
    return table(rows, ("option", *flat))


def _plain_table(content: Table) -> str:
    head, rows = content
    return table([list(map(visible, row)) for row in rows], head, numbers=True)


def _link(name: str, place: str) -> str:
    address = urllib.parse.quote(f"{Path(place).as_posix()}/{REPORT}")
    return f'<a href="{address}">{visible(name)}</a>'
