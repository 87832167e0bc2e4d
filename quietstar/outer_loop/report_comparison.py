"""Several finished runs side by side: a page, the numbers behind it, and tables for the terminal."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from quietstar.errors import DataError
from quietstar.files import write_whole
from quietstar.outer_loop.report_arms import budget_note, choices, compare, ends, equal
from quietstar.outer_loop.report_comparison_page import comparison_page
from quietstar.outer_loop.report_files import LoopRun, read_loop
from quietstar.outer_loop.report_table import text_table
from quietstar.reporting.train_report import REPORT
from quietstar.training.output_dir import write_json

COMPARISON = "comparison.json"


def write_comparison(out: Path | str, arms: Mapping[str, Path], budget: float | None = None) -> Path:
    """Writes `report.html` and `comparison.json` about several runs.

    Args:
        out: The directory to write to, which exists.
        arms: Directories of the runs by name, each with its `summary.json`.
        budget: Completions of each training problem to compare at; null: the most that all have.

    Returns:
        The page.

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
        arms, budget: As for `write_comparison`, as are the errors.
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
    """The runs that `write_comparison` has compared in a directory, and the budget that it was given.

    Raises:
        DataError: `comparison.json` cannot be read.
    """
    file = out / COMPARISON
    try:
        content = json.loads(file.read_bytes())
        equal = content["equal_budget"]
        budget = equal["budget"] if equal is not None and equal["asked"] else None
        return {str(name): out / place for name, place in content["directories"].items()}, budget
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: cannot be read ({error!r}); run the command of the comparison again") from None


def _read(arms: Mapping[str, Path]) -> dict[str, LoopRun]:
    if not arms:
        raise DataError("comparison: got no run; needs at least one")
    return {name: read_loop(Path(directory)) for name, directory in arms.items()}
