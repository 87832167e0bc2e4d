"""The plans of Mistral-7B are the committed ones: they rest on no machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import plan_mistral_7b
from benchmarks.script import RESULTS

PARAMETERS = 7_241_732_096
"""Of Mistral-7B-v0.1, as its model card has it."""


@pytest.mark.slow
def test_a_setting_is_planned_as_the_committed_table_says(tmp_path: Path) -> None:
    setting = "language modelling"
    assert plan_mistral_7b.main(["--settings", setting, "--out", str(tmp_path / "plan.md")]) == 0

    def line(file: Path) -> list[str]:
        (found,) = (row for row in file.read_text().splitlines() if row.startswith(f"| {setting} "))
        return [cell.strip() for cell in found.split("|")[1:-1]]

    cells = line(tmp_path / "plan.md")
    assert cells == line(RESULTS / "plan_mistral_7b.md")
    assert float(cells[1]) == pytest.approx(2 * PARAMETERS / 2**30, rel=0.02)  # bfloat16, and a mixing head
