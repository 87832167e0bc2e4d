"""The gate's benchmark puts fits together by their case and their place in the table."""

from __future__ import annotations

import csv
import random
import sys
from pathlib import Path

import pytest

from benchmarks import gate
from quietstar import QuietStarForCausalLM
from quietstar.demos.corpus import direct_line
from quietstar.demos.textbook import character_tokenizer
from tests.model.tiny import make_base, randomize_thinking


def test_a_number_of_several_fits() -> None:
    assert gate.spread([0.25], ".1%") == "25.0%"
    assert gate.spread([1.0, 2.0, 3.0], ".2f") == "2.00 +- 1.00"
    assert gate.spread([1.0, 2.0, 3.0], "+.2f") == "+2.00 +- 1.00"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = character_tokenizer()
    base = make_base(vocab_size=len(tokenizer), max_position_embeddings=128)
    model = QuietStarForCausalLM.from_base(base, start_text=[5], end_text=[6], thought_length=2)
    randomize_thinking(model)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(str(tmp_path / "model"))
    rng = random.Random(0)
    (tmp_path / "sums.txt").write_text("".join(direct_line([rng.randrange(7) for _ in range(4)]) for _ in range(60)))
    monkeypatch.setattr(gate, "PROMPTS", 2)
    monkeypatch.setattr(gate, "FEW", 1)
    monkeypatch.setattr(gate, "NEW", 12)
    monkeypatch.setattr(gate, "WAYS", ("never", "learned>0"))
    source = [str(tmp_path / "model"), str(tmp_path / "sums.txt"), "20"]
    arguments = [
        "--case",
        "tiny",
        *source,
        "--about",
        "tiny",
        "Of no use.",
        "--splits",
        "2",
        "--sums",
        *source,
        "--results",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["gate.py", *arguments])
    gate.main()
    written = (tmp_path / "gate.md").read_text()
    assert "## tiny" in written and "2 fits to 418 tokens each, judged on 152." in written
    assert "\n\nOf no use.\n\n| think" in written
    assert "learned, about 50%" in written and "## Sums that" in written
    assert '`think="learned"` means never in' in written
    assert "The first 1 prompts, one at a time" in written and written.count("tokens/s") == 2
    lines = [line for line in (tmp_path / "gate.csv").read_text().splitlines() if not line.startswith("#")]
    assert {row["case"] for row in csv.DictReader(lines)} == {"tiny"}
