"""Both loops run on problems of GSM8K's form, and their tables count what the stores hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gsm8k_loops
from tests.outer_loop.loops import kept
from tests.outer_loop.recomputed import lines_of

SUMS = {"train": ((3, 4), (2, 5), (6, 1), (4, 4)), "test": ((3, 4), (5, 2))}


def is_right(line: dict[str, Any]) -> bool:
    """The model that is asked about `What is 3 + 4?` (a problem's id is its line) wrote `#### 7`."""
    first, second = SUMS["test" if line["purpose"] == "evaluate" else "train"][int(line["problem"]) - 1]
    return bool(line["text"].partition("\n#### ")[2].split("\n")[0].strip() == str(first + second))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_tables_count_what_the_stores_hold(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "gsm8k"
    folder.mkdir(parents=True)
    for split, sums in SUMS.items():
        problems = (
            {"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"}
            for a, b in sums
        )
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    words = ["--quick", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "runs")]
    gsm8k_loops.main([*words, "--results", str(tmp_path)])
    text = (tmp_path / "gsm8k_loops.md").read_text()
    for title, name, samples in (("STaR", "star", 1), ("V-STaR", "vstar", 4)):
        part = text.split(f"## {title}\n")[1].split("\n## ")[0]
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if "| " in line][:4]
        run = tmp_path / "runs" / name
        sampled = lines_of(run, 1, "sample")
        assert len(sampled) == 4 * samples
        last = next(row for row in rows if row[0] == "1")
        assert last[1] == f"{sum(map(is_right, sampled))} of {len(sampled)}"
        again = lines_of(run, 1, "rationalize")
        assert last[2] == (f"{sum(map(is_right, again))} of {len(again)}" if again else "")
        assert last[3] == str(len(kept(run, 1)))
        for iteration, row in enumerate(row for row in rows if row[0] in ("0", "1")):
            greedy = lines_of(run, iteration, "evaluate")
            assert row[5] == f"{sum(map(is_right, greedy))} of 2" and len(greedy) == 2
            assert row[6] == f"{sum(line['finish_reason'] == 'length' for line in greedy) / 2:.0%}"
    assert "| pass " in text and "| best-of verifier (sum) " in text
