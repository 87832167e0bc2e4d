"""The sampling benchmark counts the same tokens on both sides, and runs."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from benchmarks.rationale_sampling import OURS, PLAIN, TINY, main, plain

pytestmark = pytest.mark.usefixtures("one_thread")


def test_useful_tokens_go_up_to_the_first_end() -> None:
    class Words:
        eos_token_id = 0

        def __call__(self, texts: list[str], **options: Any) -> BatchEncoding:
            return BatchEncoding({"input_ids": torch.ones(len(texts), 2, dtype=torch.int64)})

        def batch_decode(self, tokens: Any, **options: Any) -> None:
            pass

    new = torch.tensor([[5, 0, 0, 0], [5, 6, 7, 8], [0, 0, 0, 0], [5, 6, 7, 0]])

    def generate(input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        return torch.cat((input_ids.repeat_interleave(options["num_return_sequences"], 0), new), -1)

    model = SimpleNamespace(generate=generate, device="cpu")
    setting = TINY["tiny, k = 2"]
    assert plain(model, Words(), ["a b", "c d"], setting, batch_size=4) == (2 + 4 + 1 + 4, 4)


def test_both_sides_run_and_sample_texts_of_the_same_length(tmp_path: Path) -> None:
    main(["--tiny", "--repeats", "2", "--out", str(tmp_path / "found.md")])
    text = (tmp_path / "found.csv").read_text()
    rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
    assert [row["side"] for row in rows] == [OURS, PLAIN]
    for row in rows:
        assert int(row["completions"]) == 6 and float(row["cpu_seconds"]) > 0
        assert 2 < float(row["tokens_per_completion"]) <= 8
    assert "times as fast" in (tmp_path / "found.md").read_text()
