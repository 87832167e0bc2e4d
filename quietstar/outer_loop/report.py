"""What people see of a run: a table, and a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def print_table(summary: Mapping[str, Any]) -> None:
    """One line for each iteration."""
    for row in summary["iterations"]:
        held_out = row.get("held_out", {})
        print(row["iteration"], held_out.get("accuracy"), row.get("built"))


def write_loop_report(out: Path) -> None:
    """The page."""
