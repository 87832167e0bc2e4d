"""Rows of the textbook's benchmark share character models where the textbook is the same."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import textbook
from quietstar.demos import textbook as experiment


def test_stream_tokens() -> None:
    assert textbook.stream_tokens({}) == 39 * 2 * 10
    assert textbook.stream_tokens({"model.positions": "entropy:0.25"}) == 10 * 2 * 10


@pytest.mark.slow
def test_rows_start_from_the_same_character_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {"textbook.pretraining_steps": "2", "training.steps": "2", "training.eval_every": "1"}
    rows = {"default": {}, "short": {"model.thought_length": "4"}}
    monkeypatch.setattr(textbook, "ROWS", rows)
    monkeypatch.setattr(experiment, "HELD_OUT_TEXTS", 4)
    parse = textbook.parse_train_config
    more = [word for key, value in short.items() for word in (f"--{key}", value)]
    monkeypatch.setattr(textbook, "parse_train_config", lambda words: parse([*words, *more]))
    options = argparse.Namespace(output=tmp_path, seeds=1, threads=1)
    for name in rows:
        assert "quietstar" in textbook.run(name, options, tmp_path / "default")["0"]
    weights = [tmp_path / name / "seed-0" / "base" / "model.safetensors" for name in rows]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not (tmp_path / "short" / "seed-0" / "reading").exists()
