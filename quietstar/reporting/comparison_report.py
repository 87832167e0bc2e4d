"""Comparison of several finished runs of STaR and V-STaR: a page, the numbers behind it, and tables for the terminal.

`compare` computes the numbers: accuracy by iteration, by budget of completions, and at one budget that all runs have.
`comparison_page` shows them; `write_comparison` and `print_comparison` are what the commands call. The command
`report`, which writes the page of any directory, is at the end.
"""

from __future__ import annotations

import os
import shutil
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from quietstar.config.command_line import Command
from quietstar.config.options import INPUT
from quietstar.config.parsing import check_type, parse_json
from quietstar.errors import DataError
from quietstar.reporting.charts import MOST_LINES
from quietstar.reporting.loop_charts import PER_CENT, accuracy_curve, first_of, group_curves, group_names, progress_card
from quietstar.reporting.loop_files import (
    LoopRun,
    Row,
    Way,
    grid,
    interval,
    main_ways,
    read_loop,
    text_table,
    way_name,
    ways,
)
from quietstar.reporting.loop_report import write_loop_report
from quietstar.reporting.page import escaped, folded_table, header, page, panels, section, table, visible, warning_list
from quietstar.reporting.run_facts import flatten, machines, shown
from quietstar.reporting.scales import number
from quietstar.reporting.train_report import write_report
from quietstar.runs.files import COMPARISON, REPORT, STORE, SUMMARY, write_json, write_whole

OWN = frozenset({"output_dir", "preset"})
"""Options that are expected to differ between runs."""
BUDGET = "completions per problem"
Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True)
class _Budget:
    budget: float
    asked: bool


@dataclass(frozen=True)
class _Comparison:
    """What is read again of `comparison.json`."""

    directories: dict[str, str]
    equal_budget: _Budget | None


def comparison_page(
    title: str, runs: Mapping[str, LoopRun], places: Mapping[str, str], budget: float | None = None
) -> str:
    """Returns the page of a comparison as HTML.

    Args:
        title: Title of the page.
        runs: Runs to compare, by name.
        places: Directory of each run by name, relative to the directory of the page.
        budget: Completions per training problem to compare at; None for the largest budget that all runs have.
    """
    compared = compare(runs, budget)
    head, rows = ends(compared)
    cells = [[_link(row[0], places[row[0]]), *map(visible, row[1:])] for row in rows]
    equal_head, at_budget = equal(compared)
    warnings = [f"{name}: {warning}" for name, run in runs.items() for warning in run.summary.get("warnings", ())]
    return page(
        f"{title} · comparison",
        [
            header(title, runs),
            section("Warnings", [warning_list([*_other_problems(compared), *warnings])]),
            section(
                "Held-out accuracy",
                [panels(_accuracy(compared)), table(cells, head, numbers=True)],
                "Greedy, per cent, with 95 % intervals over problems. Steps of fine-tuning and completions sampled, "
                "hinted ones too, are those of all iterations.",
            ),
            section(
                "At an equal budget",
                [table(escaped(at_budget), equal_head, numbers=True)],
                budget_note(compared),
            ),
            section(
                "By group",
                [panels(_groups(runs))],
                "Held-out accuracy in per cent of each group of problems, one panel for each run.",
            ),
            section(
                "Choosing among candidates",
                _choices(runs),
                "One of k candidates for each held-out problem, per cent right, with 95 % intervals over problems.",
            ),
            section("What differs", [_differing(runs)], "Options whose values are not the same in all runs."),
            machines(list(runs.values())[-1].files.environment),
        ],
        "Written by quietstar from the files of the runs; point at a chart for its numbers.",
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
                colour=1 + place,
            )
            for place, (name, own) in enumerate(list(points.items())[:MOST_LINES])
        ]
        flat = " A run without iterations is a level line." if any(len(own) == 1 for own in points.values()) else ""
        text = f"{note} Shaded: 95 % interval over problems.{flat}{first_of(len(points), 'runs')}"
        drawn.append(progress_card(title, text, series, x_label=label, x_range=(0, end), y_scale=PER_CENT))
    return drawn


def _stretched(x: list[float], rows: list[Row], end: float) -> tuple[Any, list[Row]]:
    """Returns the points of a curve; a single point becomes a level line up to `end`."""
    if len(x) == 1 and end > x[0]:
        x, rows = [x[0], end], rows * 2
    return np.array(x, float), rows


def _groups(runs: Mapping[str, LoopRun]) -> list[str]:
    end = float(max(row["iteration"] for run in runs.values() for row in run.rows))
    drawn = []
    for name, run in runs.items():
        x, rows = _stretched([row["iteration"] for row in run.rows], list(run.rows), end)
        axes: dict[str, Any] = {"x_label": "iteration", "x_range": (0.0, end), "y_scale": PER_CENT}
        drawn.append(
            progress_card(name, first_of(len(group_names(rows)), "groups", "its page"), group_curves(x, rows), **axes)
        )
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


def _choices(runs: Mapping[str, LoopRun]) -> list[str]:
    head, rows = choices(runs)
    names = {f"{name}: {way_name(way)}" for name, run in runs.items() for way in main_ways(run.candidates or {})}
    shown = {place for place, row in enumerate(rows) if row[0] in names}
    return folded_table(head, escaped(rows), shown, f"All {len(rows)} ways to choose")


def _link(name: str, place: str) -> str:
    address = urllib.parse.quote(f"{Path(place).as_posix()}/{REPORT}")
    return f'<a href="{address}">{visible(name)}</a>'


def compare(runs: Mapping[str, LoopRun], asked: float | None = None) -> dict[str, Any]:
    """Returns the numbers of a comparison as plain JSON values.

    Args:
        runs: Runs to compare, by name.
        asked: Completions per training problem to compare at; None for the largest budget that all runs have.

    Returns:
        `arms`, by name of the run: `task`; `points`, one for each iteration that was evaluated, with `iteration`,
        `budget` (completions sampled so far for each training problem drawn, hinted ones included), `steps` of
        fine-tuning so far, and accuracy with its interval and groups; and `candidates`. `equal_budget`: the budget,
        whether it was `asked` for, and the last point of each arm within it; None if no arm has sampled.
    """
    points = {name: _points(run.rows) for name, run in runs.items()}
    arms = {
        name: {"task": run.summary.get("task"), "points": points[name], "candidates": run.candidates}
        for name, run in runs.items()
    }
    largest = [own[-1]["budget"] for own in points.values() if own and own[-1]["budget"]]
    if not largest:
        return {"arms": arms, "equal_budget": None}
    limit = min(largest) if asked is None else asked
    within = {
        name: [point for point in own if point["budget"] <= limit * (1 + 1e-9)][-1:] for name, own in points.items()
    }
    last = {name: one[0] for name, one in within.items() if one}
    return {"arms": arms, "equal_budget": {"budget": limit, "asked": asked is not None, "arms": last}}


def _points(rows: Sequence[Row]) -> list[dict[str, Any]]:
    points, budget, steps = [], 0.0, 0
    for row in rows:
        if "sampled" in row:
            made = row["sampled"]["samples"] + row.get("rationalized", {}).get("samples", 0)
            budget += made / max(1, row["sampled"]["problems"])
        steps += row.get("trained", {}).get("steps", 0)
        if "held_out" in row:
            held_out = {key: row["held_out"].get(key) for key in ("accuracy", "low", "high", "by_group", "problems")}
            points.append({"iteration": row["iteration"], "budget": budget, "steps": steps, **held_out})
    return points


def ends(compared: Mapping[str, Any]) -> Table:
    """Returns columns and cells of a table: each run after its last iteration."""
    rows = []
    for name, arm in compared["arms"].items():
        if arm["points"]:
            last = arm["points"][-1]
            rows.append([name, str(last["iteration"]), *_cells(last)])
        else:
            rows.append([name, "", "", "", ""])
    return ["run", "iterations", "held-out accuracy", "fine-tuning steps", BUDGET], rows


def equal(compared: Mapping[str, Any]) -> Table:
    """Returns columns and cells of a table: each run at the compared budget; both are empty if there is none."""
    if compared["equal_budget"] is None:
        return [], []
    rows = [[name, str(point["iteration"]), *_cells(point)] for name, point in compared["equal_budget"]["arms"].items()]
    return ["run", "iteration", "held-out accuracy", "fine-tuning steps", BUDGET], rows


def _cells(point: Row) -> list[str]:
    return [interval(point, "accuracy"), f"{point['steps']:,}", number(point["budget"], 3)]


def budget_note(compared: Mapping[str, Any]) -> str:
    """Returns a sentence about the compared budget; empty if there is none."""
    if compared["equal_budget"] is None:
        return ""
    budget = number(compared["equal_budget"]["budget"], 3)
    within = f"The last iteration of each run within {budget} completions for each training problem"
    if compared["equal_budget"]["asked"]:
        return f"{within}, the budget that was asked for."
    return f"{within}, the largest budget that all runs with completions have used."


def choices(runs: Mapping[str, LoopRun]) -> Table:
    """Returns columns and cells of a table: all ways to choose, of all runs that have candidates."""
    table: dict[Way, Mapping[int, Row]] = {}
    names: dict[Way, str] = {}
    for name, run in runs.items():
        for way, values in ways(run.candidates).items() if run.candidates else ():
            key: Way = (name, way_name(way))
            table[key], names[key] = values, f"{name}: {way_name(way)}"
    return grid(table, interval, names.__getitem__)


def write_comparison(out: Path | str, arms: Mapping[str, Path], budget: float | None = None) -> Path:
    """Writes `report.html` and `comparison.json` about several runs.

    Args:
        out: Existing directory to write to.
        arms: Directories of the runs by name, each with its `summary.json`.
        budget: Completions per training problem to compare at; None for the largest budget that all runs have.

    Returns:
        Path of the page.

    Raises:
        DataError: A run has no summary, or there is no run.
        OSError: A file cannot be written.
    """
    runs = _read(arms)
    out = Path(out)
    places = {name: os.path.relpath(directory, out) for name, directory in arms.items()}
    path = out / REPORT
    write_whole(path, comparison_page(out.resolve().name, runs, places, budget))
    write_json(out / COMPARISON, {"directories": places, **compare(runs, budget)})
    return path


def print_comparison(arms: Mapping[str, Path], budget: float | None = None) -> None:
    """Prints the tables of several runs.

    Args:
        arms: Directories of the runs by name, each with its `summary.json`.
        budget: Completions per training problem to compare at; None for the largest budget that all runs have.

    Raises:
        DataError: A run has no summary, or there is no run.
    """
    width = shutil.get_terminal_size((10_000, 24)).columns  # a file or pipe takes lines of any length
    runs = _read(arms)
    compared = compare(runs, budget)
    print(f"After the last iteration: per cent of the held-out problems, greedy.\n{text_table(*ends(compared), width)}")
    if compared["equal_budget"] is not None:
        print(f"\n{budget_note(compared)}\n{text_table(*equal(compared), width)}")
    head, rows = choices(runs)
    if rows:
        print(f"\nOne of k candidates, per cent right.\n{text_table(head, rows, width)}")


def compared_before(out: Path) -> tuple[dict[str, Path], float | None]:
    """Returns the runs that `write_comparison` compared in a directory, by name, and the budget that it was given.

    Raises:
        DataError: `comparison.json` cannot be read.
    """
    file = out / COMPARISON
    try:
        content = parse_json(file.read_bytes())
        check_type(content, _Comparison, "comparison")
    except (OSError, DataError) as error:
        raise DataError(f"{file}: cannot be read ({error}); run the command of the comparison again") from None
    equal = content["equal_budget"]
    budget = equal["budget"] if equal is not None and equal["asked"] else None
    return {name: out / place for name, place in content["directories"].items()}, budget


def _read(arms: Mapping[str, Path]) -> dict[str, LoopRun]:
    if not arms:
        raise DataError("comparison: got no run; needs at least one")
    return {name: read_loop(Path(directory)) for name, directory in arms.items()}


@dataclass(frozen=True)
class ReportOptions:
    """Writes report.html into the directory of a run: one file that needs no network.

    Args:
        run_directory: Directory of a training run, finished or not, of a run of STaR or V-STaR, or of a comparison of
            such runs.
    """

    run_directory: Annotated[Path, INPUT]


REPORT_COMMAND = Command("report", ReportOptions, argument="run_directory")


def write_any_report(directory: Path) -> Path:
    """Writes the page of a directory and returns its path, whatever kind of run wrote the directory.

    Raises:
        DataError: It is not a run directory, or it belongs to a run of STaR or V-STaR that has no summary yet.
    """
    if (directory / COMPARISON).is_file():
        return write_comparison(directory, *compared_before(directory))
    if any((directory / name).is_file() for name in (SUMMARY, STORE)):
        return write_loop_report(directory)
    return write_report(directory)
