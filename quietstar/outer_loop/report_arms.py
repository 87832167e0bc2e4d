"""The numbers of several runs: their accuracy at each budget of completions, and at one that all have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quietstar.outer_loop.report_files import LoopRun
from quietstar.outer_loop.report_table import Row, Way, grid, interval, way_name, ways
from quietstar.reporting.scales import number

BUDGET = "completions per problem"
Table = tuple[list[str], list[list[str]]]


def compare(runs: Mapping[str, LoopRun], asked: float | None = None) -> dict[str, Any]:
    """The numbers of a comparison, plain JSON values.

    Args:
        runs: By name.
        asked: The budget to compare at; null: the largest that all have.

    Returns:
        `arms`: of each its `task` and `points`, one for each iteration that was evaluated: `iteration`, `budget`
        (completions sampled so far, hinted ones too, of each training problem drawn), `steps` of fine-tuning so far,
        and accuracy with its interval and groups; and its `candidates`. `equal_budget`: the budget, whether it
        was `asked` for, and each arm's last point within it; null where no arm has sampled.
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
    """Columns and cells: each run after its last iteration."""
    rows = []
    for name, arm in compared["arms"].items():
        if arm["points"]:
            last = arm["points"][-1]
            rows.append([name, str(last["iteration"]), *_cells(last)])
        else:
            rows.append([name, "", "", "", ""])
    return ["run", "iterations", "held-out accuracy", "fine-tuning steps", BUDGET], rows


def equal(compared: Mapping[str, Any]) -> Table:
    """Columns and cells: each run at the largest budget that all have, where there is one."""
    if compared["equal_budget"] is None:
        return [], []
    rows = [[name, str(point["iteration"]), *_cells(point)] for name, point in compared["equal_budget"]["arms"].items()]
    return ["run", "iteration", "held-out accuracy", "fine-tuning steps", BUDGET], rows


def _cells(point: Row) -> list[str]:
    return [interval(point, "accuracy"), f"{point['steps']:,}", number(point["budget"], 3)]


def budget_note(compared: Mapping[str, Any]) -> str:
    """Which budget it is."""
    if compared["equal_budget"] is None:
        return ""
    budget = number(compared["equal_budget"]["budget"], 3)
    within = f"The last iteration of each run within {budget} completions for each training problem"
    if compared["equal_budget"]["asked"]:
        return f"{within}, the budget that was asked for."
    return f"{within}, the largest budget that all runs with completions have used."


def choices(runs: Mapping[str, LoopRun]) -> Table:
    """Columns and cells: all ways to choose of all runs that have candidates."""
    table: dict[Way, Mapping[int, Row]] = {}
    names: dict[Way, str] = {}
    for name, run in runs.items():
        for way, values in ways(run.candidates).items() if run.candidates else ():
            key: Way = (name, way_name(way))
            table[key], names[key] = values, f"{name}: {way_name(way)}"
    return grid(table, interval, names.__getitem__)
