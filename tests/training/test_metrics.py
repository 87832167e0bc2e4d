"""The file of metrics: what is cut off, what is kept, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from quietstar.errors import DataError
from quietstar.training.metrics import MetricsWriter, read_metrics


def _write(path: Path, steps: range) -> None:
    with MetricsWriter(path, keep_steps=-1) as metrics:
        for step in steps:
            metrics.write(step, "train", {"loss": step / 3})
        metrics.write(steps[-1], "eval", {"loss": 0.5})


def test_what_is_written_is_read_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 4))
    assert read_metrics(path) == [
        *({"step": step, "split": "train", "loss": step / 3} for step in (1, 2, 3)),
        {"step": 3, "split": "eval", "loss": 0.5},
    ]
    assert [line["split"] for line in read_metrics(path, "eval")] == ["eval"]


def test_every_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, keep_steps=0) as metrics:
        metrics.write(1, "train", {"loss": 1.0})
        assert len(read_metrics(path)) == 1


def test_values_that_are_not_finite_are_null_and_never_zero(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, keep_steps=0) as metrics:
        metrics.write(1, "eval", {"loss": math.nan, "reward": -math.inf, "gain": 0.0})
    assert json.loads(path.read_text()) == {"step": 1, "split": "eval", "loss": None, "reward": None, "gain": 0.0}
    (line,) = read_metrics(path)
    assert math.isnan(line["loss"])


@pytest.mark.parametrize("torn", ["", '{"step": 9, "spl'])
def test_a_resumed_run_cuts_off_what_it_will_write_again(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 9))
    with path.open("a") as file:
        file.write(torn)  # the run was killed while it wrote this
    assert len(read_metrics(path)) == 9
    with MetricsWriter(path, keep_steps=5) as metrics:
        metrics.write(6, "train", {"loss": 6.0})
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5, 6]


def test_a_file_that_is_not_ours_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for content, message in (
        ('{"step": 1, "split": "train"}\nhello\n', r"metrics\.jsonl:2: not JSON"),
        ('{"loss": 1}\n', r"metrics\.jsonl:1: needs an object with an integer `step`"),
        ("[]\n", r"metrics\.jsonl:1: needs an object"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read_metrics(path)
        with pytest.raises(DataError, match=message):
            MetricsWriter(path, keep_steps=5)
        assert path.read_text() == content
