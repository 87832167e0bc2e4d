"""How long each iteration fine-tunes."""

from __future__ import annotations

import pytest

from quietstar.config.loops import LoopOptions, fine_tuning_steps


def test_the_published_course() -> None:
    """The step counts that the released scripts of STaR make; its GSM8K run was capped at the 30th."""
    steps = [fine_tuning_steps(iteration, LoopOptions(), rows=1, batch_size=8) for iteration in range(1, 31)]
    assert steps[:16] == [40, 48, 57, 69, 82, 99, 119, 143, 171, 206, 247, 297, 356, 427, 513, 616]
    assert sum(steps[:16]) == 3_490 and steps[29] == 7_912


def test_linear() -> None:
    options = LoopOptions(schedule="linear", start_steps=300, added_steps=20)
    assert [fine_tuning_steps(i, options, 1, 8) for i in (1, 2, 16)] == [300, 320, 600]


@pytest.mark.parametrize(("rows", "steps"), [(1, [1, 1, 1]), (8, [1, 2, 2]), (80, [10, 12, 14]), (81, [11, 13, 15])])
def test_epochs(rows: int, steps: list[int]) -> None:
    """No row is left out: a part of a batch is a step too."""
    options = LoopOptions(schedule="epochs", start_epochs=1.0, added_epochs=0.2)
    assert [fine_tuning_steps(i, options, rows, 8) for i in (1, 2, 3)] == steps
