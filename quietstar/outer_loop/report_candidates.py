"""What choosing one of several candidates is worth: pass@k, votes, and Best-of-k of every score."""

from __future__ import annotations

import textwrap

from quietstar.outer_loop.report_charts import best_of_k_panel, difference_panel
from quietstar.outer_loop.report_table import (
    MAJORITY,
    Row,
    Way,
    difference,
    differences,
    excludes_zero,
    grid,
    interval,
    ks_of,
    text_table,
    way_name,
    ways,
)
from quietstar.reporting.page import details, panels, section, table
from quietstar.reporting.scales import DASH
from quietstar.reporting.text import visible

AREAS = (
    "AUROC: how often a right candidate is scored above a wrong one, within the problems that have both (their number "
    "stands last), and over the candidates of all problems."
)
CALIBRATION = (
    "How far probabilities of being right are from how often candidates are right: the Brier score (mean squared "
    "difference; 0.25 for always saying one half) and the expected calibration error; 0 is best."
)


def candidates_text(candidates: Row, width: int) -> str:
    """Tables for the terminal.

    Args:
        candidates: `CandidateTable.to_json()`, and the name of the score that is compared with the others as
            `compared`; perhaps `calibration`, by name of the score what `evaluation.calibration` found.
        width: Characters of a line.
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
    """The same with a chart as a section of a page; nothing without candidates.

    Args:
        candidates: As for `candidates_text`.
    """
    if not candidates:
        return ""
    values = ways(candidates)
    compared: Way = ("best-of", candidates.get("compared"))
    head, rows = grid(values, interval)
    cells = [[visible(cell) for cell in row] for row in rows]
    for row, way in zip(cells, values, strict=True):
        row[0] = f"<b>{row[0]}</b>" if way == compared else row[0]
    area_head, areas = _areas(candidates)
    charts = panels([best_of_k_panel(candidates), difference_panel(candidates)])
    quality = table([list(map(visible, row)) for row in areas], area_head, numbers=True)
    parts = [
        section("Choosing among candidates", [charts, table(cells, head, numbers=True)], _about(candidates)),
        _differences(candidates),
        section("Telling right from wrong", [quality], AREAS),
        _calibration_section(candidates),
    ]
    return "\n".join(filter(None, parts))


def sure_sentence(candidates: Row) -> str:
    """At how many k the compared score is surely better than the majority vote; empty where it was not compared."""
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
        "where "
        "the 95 % interval excludes 0."
    )
    listed = table(rows, ["minus", *(f"k = {k}" for k in ks)], numbers=True)
    return section("Differences", [listed], note)


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
    listed = table([list(map(visible, row)) for row in rows], head, numbers=True)
    return section("Calibration", [listed, *_reliability(candidates)], CALIBRATION)


def _reliability(candidates: Row) -> list[str]:
    """The bins of each reliability diagram as a table."""
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
        "drawn; "
        "per cent right, with 95 % intervals over problems."
    )
