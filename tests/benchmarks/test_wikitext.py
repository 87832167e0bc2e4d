"""The benchmark on natural text reads, thinks and writes; its table holds the last run's own metrics."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks import wikitext
from quietstar.training.metrics import read_metrics


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_table_is_that_of_the_runs_metrics(tmp_path: Path) -> None:
    pytest.importorskip("mistral_common")
    draw = random.Random(0)
    for split, words in (("train", 1500), ("valid", 700)):
        (tmp_path / f"{split}.txt").write_text(" ".join(draw.choices(["the", "old", "house", "of", "stone"], k=words)))
    words = ["--data", str(tmp_path), "--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    wikitext.main([*words, "--reading-steps", "2", "--steps", "2", "--threads", "1"])
    text = (tmp_path / "results" / "wikitext.md").read_text()
    metrics = read_metrics(tmp_path / "runs" / "thinking" / "metrics.jsonl", split="eval")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    for point, row in zip(metrics, table[2:], strict=False):  # below the heads and a rule
        assert row == [f"{point[name]:.4g}" for name in table[0]]
    assert len(metrics) > 0 and "python -m quietstar.train" in text and str(tmp_path) not in text
    assert "<svg" in (tmp_path / "results" / "wikitext.svg").read_text()
