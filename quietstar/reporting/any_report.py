"""The `report` command: the page of a directory, whatever kind of run wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from quietstar.config.command_line import Command
from quietstar.config.options import INPUT
from quietstar.reporting.comparison_report import compared_before, write_comparison
from quietstar.reporting.loop_report import write_loop_report
from quietstar.reporting.train_report import write_report
from quietstar.runs.files import COMPARISON, STORE, SUMMARY


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
