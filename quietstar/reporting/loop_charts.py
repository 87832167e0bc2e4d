"""The charts and tables of a run of STaR or V-STaR.

The first half draws one point for each iteration: accuracy, what was kept, completions. The second half draws one point
for each number k of candidates: pass@k, votes, and Best-of-k of every score.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from quietstar.reporting.charts import MOST_LINES, chart_card
from quietstar.reporting.loop_files import (
    MAJORITY,
    PASS,
    Row,
    Way,
    difference,
    differences,
    excludes_zero,
    grid,
    interval,
    ks_of,
    main_ways,
    natural,
    text_table,
    way_name,
    ways,
)
from quietstar.reporting.page import details, escaped, folded_table, panels, section, table, visible
from quietstar.reporting.scales import DASH, Floats, Scale, Series, linear_scale

PER_CENT = Scale(0, 100, (0, 20, 40, 60, 80, 100))
GREY = 7
AREAS = (
    "AUROC: how often a right candidate is scored above a wrong one, within the problems that have both (their number "
    "stands last), and over the candidates of all problems."
)
CALIBRATION = (
    "How far probabilities of being right are from how often candidates are right: the Brier score (mean squared "
    "difference; 0.25 for always saying one half) and the expected calibration error; 0 is best."
)


def first_of(count: int, things: str, where: str = "the table") -> str:
    """Returns the part of a chart's note that says that it does not draw everything; empty if it does."""
    return f" The first {MOST_LINES} of {count} {things}; {where} has all." if count > MOST_LINES else ""


def measure(row: Row, *path: str) -> float:
    """Returns the number at a path of keys in the row of an iteration; NaN if there is none."""
    value: Any = row
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else math.nan


def accuracy_curve(x: Floats, rows: Sequence[Row], name: str, **options: Any) -> Series:
    """Returns the curve of held-out accuracy in per cent with its 95 % interval as a band."""
    mean, low, high = (
        100 * np.array([measure(row, "held_out", key) for row in rows]) for key in ("accuracy", "low", "high")
    )
    return Series(name, x, mean, band=(low, high), **options)


def group_curves(x: Floats, rows: Sequence[Row]) -> list[Series]:
    """Returns the curves of held-out accuracy in per cent of the first `MOST_LINES` groups of problems."""
    groups = group_names(rows)
    return [
        Series(
            group or "(none)",
            x,
            100 * np.array([measure(row, "held_out", "by_group", group) for row in rows]),
            colour=1 + i,
        )
        for i, group in enumerate(groups[:MOST_LINES])
    ]


def group_names(rows: Sequence[Row]) -> list[str]:
    """Returns the names of all groups of held-out problems; empty if there is only one group."""
    names = {group for row in rows for group in row.get("held_out", {}).get("by_group", {})}
    return sorted(names, key=natural) if len(names) > 1 else []


def progress_card(title: str, note: str, series: Sequence[Series], **options: Any) -> str:
    """Returns a panel of the curves that have a number; empty if none has two points, or all numbers are 0."""
    curves = [one for one in series if np.isfinite(one.y).any()]
    if not any(np.isfinite(one.y).sum() > 1 for one in curves) or not any(np.nan_to_num(one.y).any() for one in curves):
        return ""
    return chart_card(title, note, curves, **options)


def per_iteration(rows: Sequence[Row]) -> Callable[..., str]:
    """Returns a function that draws panels from 0; it takes curves as (name, path of the number in a row, colour)."""
    x = np.array([row["iteration"] for row in rows], float)
    ends = (float(x[0]), float(x[-1]))

    def draw(
        title: str, note: str, curves: Sequence[tuple[str, Sequence[str], int]], factor: float = 1.0, **options: Any
    ) -> str:
        series = [
            Series(name, x, factor * np.array([measure(row, *path) for row in rows]), colour)
            for name, path, colour in curves
        ]
        most = max((float(one.y[np.isfinite(one.y)].max(initial=0.0)) for one in series), default=0.0)
        axes = {"x_label": "iteration", "x_range": ends, "y_scale": linear_scale(0.0, most), **options}
        return progress_card(title, note, series, **axes)

    return draw


def accuracy_panels(rows: Sequence[Row]) -> list[str]:
    """Returns the panels of accuracy on held-out and training problems."""
    x = np.array([row["iteration"] for row in rows], float)
    axes: dict[str, Any] = {"x_label": "iteration", "x_range": (float(x[0]), float(x[-1])), "y_scale": PER_CENT}
    groups = group_names(rows)
    note = "Greedy accuracy on held-out problems in per cent, by group; 0 is before the first iteration."
    note += first_of(len(groups), "groups")
    later = [row for row in rows if "sampled" in row]
    made = np.array([row["iteration"] - 1 for row in later], float)  # iteration of the model that sampled
    training: list[tuple[str, tuple[str, ...], int]] = [
        ("samples of training problems", ("sampled", "accuracy"), 2),
        ("failures retried with the hint", ("rationalized", "accuracy"), 3),
    ]
    if any(row["sampled"]["samples"] > row["sampled"]["problems"] for row in later):
        training.insert(1, ("training problems with a right sample", ("solved_share",), 5))
        later = [{**row, "solved_share": row["sampled"]["solved"] / row["sampled"]["problems"]} for row in later]
    by_model = [
        accuracy_curve(x, rows, "held-out problems, greedy", colour=1),
        *(
            Series(name, made, 100 * np.array([measure(row, *path) for row in later]), colour)
            for name, path, colour in training
        ),
    ]
    return [
        progress_card("Held-out accuracy by group", note, group_curves(x, rows), **axes),
        progress_card(
            "Held-out and training problems",
            "Per cent right, each at the iteration that made the model; shaded: 95 % interval over problems.",
            by_model,
            **axes,
        ),
    ]


def kept_panels(rows: Sequence[Row]) -> list[str]:
    """Returns the panels of the completions that were kept for training."""
    later = [{**row, "own": row["built"]["kept"] - row["built"]["hinted"]} for row in rows if "built" in row]
    if not later:
        return []
    draw = per_iteration(later)
    sources = [("sampled", ("own",), 2), ("rationalised", ("built", "hinted"), 3)]
    return [
        draw(
            "Kept for training",
            "Completions with a right answer, after duplicates were left out.",
            sources if any(row["built"]["hinted"] for row in later) else sources[:1],
        ),
        draw(
            "Right inside",
            "Per cent of the kept completions whose every step is right; the answer is right in all.",
            [
                ("sampled", ("built", "right_inside_sample"), 2),
                ("rationalised", ("built", "right_inside_rationalize"), 3),
            ],
            100.0,
            y_scale=PER_CENT,
        ),
        draw(
            "Solved training problems",
            "By a sample without hint: anew and no longer against the iteration before, and ever.",
            [("newly solved", ("newly_solved",), 1), ("lost", ("lost",), 2), ("ever solved", ("ever",), 3)],
        ),
        draw(
            "Distinct solutions",
            "Different right solutions of a solved problem in this iteration.",
            [("mean", ("distinct", "mean"), 1), ("most", ("distinct", "most"), 5)],
        ),
    ]


def completion_panels(rows: Sequence[Row]) -> list[str]:
    """Returns the panels of the form of completions, and of the optimizer steps."""
    later = [row for row in rows if row["iteration"]] or rows
    kinds = (("held-out", "held_out", 1), ("sampled", "sampled", 2), ("rationalised", "rationalized", 3))
    draw, draw_all = per_iteration(later), per_iteration(rows)
    shares = [(name, (part, "truncated"), colour) for name, part, colour in kinds]
    answers = [(name, (part, "unanswered"), colour) for name, part, colour in kinds]
    return [
        draw_all("Length", "Tokens of a completion.", [(name, (part, "tokens"), c) for name, part, c in kinds]),
        draw_all("Cut off", "Per cent of the completions that reached the limit of tokens.", shares, 100.0),
        draw_all("Without an answer", "Per cent of the completions in which no answer was found.", answers, 100.0),
        draw(
            "Steps of model and human",
            _step_note(later),
            [("model", ("step_counts", "model"), 1), ("human", ("step_counts", "human"), 2)],
        ),
        draw("Fine-tuning", "Optimizer steps of the iteration.", [("", ("trained", "steps"), 1)]),
    ]


def _step_note(rows: Sequence[Row]) -> str:
    note = "Mean number of steps in solutions of the same problems."
    correlation = measure(rows[-1], "step_counts", "pearson")
    return note if math.isnan(correlation) else f"{note} Correlation in the last iteration: {correlation:.2f}."


def best_of_k(candidates: Row) -> tuple[list[Series], dict[str, Any]]:
    """Returns curves of accuracy against k, one for each main way to choose, and the axis options of their chart."""
    values, chosen = ways(candidates), main_ways(candidates)
    looks = _looks(candidates, chosen)
    ks = ks_of({way: values[way] for way in chosen})
    curves = [_curve(curve_name(way), values[way], ks, looks[way]) for way in chosen]
    return curves, {"x_label": "k", "x_scale": k_scale(ks)} if ks else {}


def best_of_k_card(candidates: Row) -> str:
    """Returns the chart of `best_of_k` as a panel."""
    curves, axis = best_of_k(candidates)
    note = (
        "Per cent of held-out problems right when one of k candidates is chosen, by one score of each model; shaded: "
        "95 % interval over problems."
    )
    return progress_card("Best of k candidates", note, curves, wide=True, **axis)


def difference_card(candidates: Row) -> str:
    """Returns a panel of the gain of the compared score over the other main ways to choose, against k."""
    gaps, main = differences(candidates), main_ways(candidates)
    chosen = [way for way in gaps if way in main]
    ks = ks_of({way: gaps[way] for way in chosen})
    looks = _looks(candidates, main)
    if MAJORITY in chosen:
        looks[MAJORITY] |= {"banded": True}
    return progress_card(
        "Gain over other ways to choose",
        "Percentage points on the same problems; shaded: 95 % interval of the gain over the majority vote.",
        [_curve(f"over {curve_name(way)}", gaps[way], ks, looks[way]) for way in chosen],
        wide=True,
        x_label="k",
        x_scale=k_scale(ks) if ks else None,
    )


def _looks(candidates: Row, chosen: Sequence[Way]) -> dict[Way, dict[str, Any]]:
    """Returns the options with which each way is drawn, the same in every chart of a run."""
    fixed: dict[Way, dict[str, Any]] = {
        PASS: {"colour": GREY, "dashed": True},
        ("best-of", candidates.get("compared")): {"colour": 1, "banded": True},
        MAJORITY: {"colour": 2},
    }
    others = [way for way in chosen if way not in fixed]
    return fixed | {way: {"colour": 3 + place} for place, way in enumerate(others)}


def _curve(name: str, by_k: Mapping[int, Row], ks: Sequence[int], look: Mapping[str, Any]) -> Series:
    mean, low, high = (100 * np.array([measure(by_k.get(k, {}), end) for k in ks]) for end in ("mean", "low", "high"))
    options = {key: value for key, value in look.items() if key != "banded"}
    return Series(name, np.array(ks, float), mean, band=(low, high) if look.get("banded") else None, **options)


def k_scale(ks: Sequence[int]) -> Scale:
    """Returns a logarithmic scale of k with at most 8 ticks, each at a value of `ks`."""
    return Scale(ks[0], ks[-1], tuple(map(float, ks[:: math.ceil(len(ks) / 8)])), log=True)


def curve_name(way: Way) -> str:
    """Returns the short name of a way to choose, for legends."""
    return {PASS: "any right (pass@k)", MAJORITY: "majority vote (maj@k)"}.get(way) or str(way[1])


def candidates_text(candidates: Row, width: int) -> str:
    """Returns the tables of `candidates_section` for the terminal.

    Args:
        candidates: `CandidateTable.to_json()` with `compared`, the name of the score that is compared with the others,
            and optionally `calibration`, the result of `quietstar.statistics.ranking.calibration` by name of the score.
        width: Largest number of characters in a line.
    """
    head, cells = grid(ways(candidates), interval)
    parts = [f"{_about(candidates)}\n{text_table(head, cells, width)}"]
    gaps = differences(candidates)
    if gaps:
        sure = {way: {k: value for k, value in by_k.items() if excludes_zero(value)} for way, by_k in gaps.items()}
        sure = {way: by_k for way, by_k in sure.items() if by_k}
        name = f"best by {candidates['compared']}"
        if sure:
            rows = text_table(*grid(sure, difference), width)
            parts.append(f"{name}, minus the others, where the 95 % interval of the difference excludes 0:\n{rows}")
        else:
            parts.append(f"{name}: no difference to another way has a 95 % interval that excludes 0")
    head, cells = _areas(candidates)
    if cells:
        parts.append(f"{textwrap.fill(AREAS, min(width, 100))}\n{text_table(head, cells, width)}")
    head, cells = _calibration(candidates)
    if cells:
        parts.append(f"{textwrap.fill(CALIBRATION, min(width, 100))}\n{text_table(head, cells, width)}")
    return "\n\n".join(parts)


def candidates_section(candidates: Row | None) -> str:
    """Returns the tables of `candidates_text`, with charts, as sections of a page; empty without candidates.

    Args:
        candidates: Measures of the candidates in the form that `candidates_text` takes, or None.
    """
    if not candidates:
        return ""
    values = ways(candidates)
    compared: Way = ("best-of", candidates.get("compared"))
    main = main_ways(candidates)
    head, rows = grid(values, interval)
    shown = {place for place, way in enumerate(values) if way in main}
    bold = {place for place, way in enumerate(values) if way == compared}
    ways_table = folded_table(head, escaped(rows), shown, f"All {len(rows)} ways to choose", bold)
    area_head, areas = _areas(candidates)
    told = {place for place, row in enumerate(areas) if ("best-of", row[0]) in main}
    quality = folded_table(area_head, escaped(areas), told, f"All {len(areas)} scores")
    parts = [
        section("Choosing among candidates", [panels([best_of_k_card(candidates)]), *ways_table], _about(candidates)),
        _differences(candidates),
        section("Telling right from wrong", quality if areas else [], AREAS),
        _calibration_section(candidates),
    ]
    return "\n".join(filter(None, parts))


def sure_sentence(candidates: Row) -> str:
    """Returns at how many k the compared score is surely better than the majority vote; empty without comparison."""
    gaps = {k: value for k, value in differences(candidates).get(MAJORITY, {}).items() if k > 1}  # 1 leaves no choice
    if not gaps:
        return ""
    better, worse = (sum(excludes_zero(v) and (v["mean"] > 0) is sign for v in gaps.values()) for sign in (True, False))
    below = f", surely below it at {worse}" if worse else ""
    return f"surely above the vote at {better} of {len(gaps)} k{below}"


def _differences(candidates: Row) -> str:
    gaps = differences(candidates)
    if not gaps:
        return ""
    ks = ks_of(gaps)
    rows = []
    for way, by_k in gaps.items():
        cells = [visible(way_name(way))]
        for k in ks:
            text = visible(difference(by_k[k])) if k in by_k else ""
            cells.append(f"<b>{text}</b>" if k in by_k and excludes_zero(by_k[k]) else text)
        rows.append(cells)
    note = (
        f"Best by {candidates['compared']}, minus each other way on the same problems, in percentage points; bold "
        "where the 95 % interval excludes 0."
    )
    main = main_ways(candidates)
    shown = {place for place, way in enumerate(gaps) if way in main}
    listed = folded_table(["minus", *(f"k = {k}" for k in ks)], rows, shown, f"All {len(rows)} differences")
    return section("Differences", [panels([difference_card(candidates)]), *listed], note)


def _areas(candidates: Row) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            name,
            *(DASH if area[key] is None else f"{area[key]:.3f}" for key in ("within", "pooled")),
            str(area["problems"]),
        ]
        for name, area in candidates.get("discrimination", {}).items()
    ]
    return ["AUROC", "within problems", "over all", "problems"], rows


def _calibration(candidates: Row) -> tuple[list[str], list[list[str]]]:
    rows = [
        [name, f"{found['brier']:.3f}", f"{found['expected_calibration_error']:.3f}"]
        for name, found in candidates.get("calibration", {}).items()
    ]
    return ["calibration", "Brier score", "expected calibration error"], rows


def _calibration_section(candidates: Row) -> str:
    head, rows = _calibration(candidates)
    if not rows:
        return ""
    listed = table(escaped(rows), head, numbers=True)
    return section("Calibration", [listed, *_reliability(candidates)], CALIBRATION)


def _reliability(candidates: Row) -> list[str]:
    """Returns the bins of each reliability diagram as a folded table."""
    head = ["probability", "its mean", "right", "candidates"]
    found = []
    for name, value in candidates["calibration"].items():
        rows = [
            [
                f"{one['low']:.1f} to {one['high']:.1f}",
                *(f"{one[key]:.3f}" for key in ("probability", "accuracy")),
                f"{one['candidates']:,}",
            ]
            for one in value["bins"]
        ]
        found.append(
            details(f"How often candidates are right, by what the {name} says", table(rows, head, numbers=True))
        )
    return found


def _about(candidates: Row) -> str:
    return (
        f"{candidates['problems']} held-out problems with {candidates['fewest']} candidates each, of which k are "
        "drawn; per cent right, with 95 % intervals over problems."
    )
