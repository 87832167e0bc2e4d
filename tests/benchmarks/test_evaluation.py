"""The benchmark of the evaluation trains, measures and writes; its tables are means over the items that it kept."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from benchmarks import evaluation
from tests.evaluation.evaluated import items, write_problems


def write_data(folder: Path) -> Path:
    """Two held-out problems of each task, the same to train on, and some text."""
    write_problems(folder, ["77", "7"])
    more = write_problems(folder / "more", ["77", "7"] * 8)
    for task, held_out, train in (
        ("gsm8k", "test.jsonl", "train.jsonl"),
        ("commonsenseqa", "dev_rand_split.jsonl", "train_rand_split.jsonl"),
    ):
        shutil.copy(more / task / held_out, folder / task / train)
    draw = random.Random(0)
    (folder / "wikitext2").mkdir()
    for split in ("train", "test"):
        words = (" ".join(draw.choices(["the", "old", "house", "of", "stone", "fell"], k=40)) for _ in range(12))
        (folder / "wikitext2" / f"{split}.txt").write_text("\n".join(words) + "\n")
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_table_is_of_the_items_that_were_measured(tmp_path: Path) -> None:
    data, out = write_data(tmp_path / "data"), tmp_path / "runs"
    words = ["--data", str(data), "--output", str(out), "--results", str(tmp_path), "--threads", "1"]
    evaluation.main(["--quick", *words])
    text = (tmp_path / "evaluation.md").read_text()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    for task in ("gsm8k", "commonsenseqa"):
        row = next(row for row in table if row[:2] == ["soft accuracy (%)", task])
        own = [one for one in items(out / "everything") if (one["task"], one["metric"]) == (task, "soft")]
        assert row[2] == str(len(own)) == "2"
        for cell, side in ((row[3], "off"), (row[4], "on")):
            assert cell.split(" [")[0] == f"{50 * sum(one[side] for one in own):.2f}"
    measured = {tuple(row[:2]) for row in table}
    assert {("NLL (nats)", "test.txt"), ("chain of thought, maj@8 (%)", "gsm8k")} <= measured
    assert "python -m quietstar.evaluate OUTPUT/thinking" in text and str(tmp_path) not in text
