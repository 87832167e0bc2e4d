"""What people see of a run: a table, and a page."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quietstar.files import write_whole
from quietstar.outer_loop.report_candidates import candidates_text
from quietstar.outer_loop.report_comparison import print_comparison, write_comparison
from quietstar.outer_loop.report_files import read_loop
from quietstar.outer_loop.report_page import loop_report
from quietstar.outer_loop.report_table import explanation, iteration_table, printable, text_table
from quietstar.reporting.train_report import REPORT

__all__ = ["print_comparison", "print_table", "write_comparison", "write_loop_report"]


def print_table(summary: Mapping[str, Any]) -> None:
    """Prints one line for each iteration, then what choosing among candidates is worth, then warnings.

    Args:
        summary: What `summary.json` holds.
    """
    width = shutil.get_terminal_size((10_000, 24)).columns  # a file or pipe takes lines of any length
    head, rows = iteration_table(summary["iterations"])
    print(text_table(head, rows, width))
    print(textwrap.fill(explanation(head), min(width, 100)))
    if summary.get("candidates"):
        print(f"\n{candidates_text(summary['candidates'], width)}")
    for warning in summary.get("warnings", ()):
        print(f"warning: {printable(warning)}")


def write_loop_report(out: Path | str) -> Path:
    """Writes `report.html` into the directory of a run: one file that needs no network.

    Args:
        out: `output_dir` of a run, with its `summary.json`. All else is shown as far as it is there.

    Returns:
        The file.

    Raises:
        DataError: There is no summary.
        OSError: The file cannot be written; an earlier one stays.
    """
    path = Path(out) / REPORT
    write_whole(path, loop_report(read_loop(Path(out))))
    return path
