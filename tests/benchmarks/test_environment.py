"""What a result says about how it was measured holds nothing of where."""

from __future__ import annotations

import pytest

from benchmarks.environment import describe, without_folders


def test_no_path_of_the_machine_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/opt/lib/libjemalloc.so:/opt/lib/libother.so")
    facts = describe(
        "benchmarks/train_step.py", ["--results", "/home/me/results", "--data=/home/me/text", "--steps", "3"]
    )
    assert facts["command"] == "python benchmarks/train_step.py --results results --data=text --steps 3"
    assert "LD_PRELOAD=libjemalloc.so:libother.so" in facts["environment"]


@pytest.mark.parametrize("text", ["runs/here", "../here", "https://host/page", "3/4", "--rows=a/b", ""])
def test_everything_else_stays(text: str) -> None:
    assert without_folders(text) == text
