"""The page of a directory, whatever kind of run has written it."""

from __future__ import annotations

from pathlib import Path

from quietstar.reporting.comparison_report import compared_before, write_comparison
from quietstar.reporting.loop_report import write_loop_report
from quietstar.reporting.train_report import write_report
from quietstar.runs.files import COMPARISON, STORE, SUMMARY


def write_any_report(directory: Path) -> Path:
    """Writes the page of a directory, whatever kind of run it is.

    Raises:
        DataError: It is no run directory, or a run of a loop that has no summary yet.
    """
    if (directory / COMPARISON).is_file():
        return write_comparison(directory, *compared_before(directory))
    if any((directory / name).is_file() for name in (SUMMARY, STORE)):
        return write_loop_report(directory)
    return write_report(directory)
