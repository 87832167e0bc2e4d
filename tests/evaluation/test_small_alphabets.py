"""`quietstar.evaluate` where the tokenizer knows a few characters and has no token for the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from quietstar import QuietStarForCausalLM
from quietstar.demos.corpus import SYMBOLS
from quietstar.demos.textbook import character_model, character_tokenizer
from quietstar.evaluate import main
from quietstar.evaluation.token_texts import first_tokens, token_texts
from tests.evaluation.evaluated import evaluate, result, write_problems


@pytest.fixture(scope="module")
def textbook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, own = tmp_path_factory.mktemp("textbook"), character_tokenizer()
    QuietStarForCausalLM.from_base(
        character_model(0), own, thought_length=2, lookahead=2, start_text="=", end_text="="
    ).save_pretrained(directory)
    own.save_pretrained(directory)
    return directory


def test_what_its_tokens_spell() -> None:
    own = character_tokenizer()
    assert token_texts(own) == dict(enumerate(SYMBOLS))
    assert first_tokens(own, "1+1") == []


def test_a_text_of_its_characters(textbook: Path, tmp_path: Path) -> None:
    (tmp_path / "sums.txt").write_text("1+2=3\n" * 8)
    report = evaluate(textbook, tmp_path / "out", text=tmp_path / "sums.txt", length=24)
    assert result(report, "NLL", "sums.txt")["n"] == 46


def test_other_characters_are_refused_by_name(
    textbook: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "words.txt").write_text("1+2 is three\n")
    data = write_problems(tmp_path / "data", ["3"])
    command = [str(textbook), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    for options, name in (
        (["--length", "24", "--text", str(tmp_path / "words.txt")], "words.txt"),
        (["--tasks", "gsm8k", "--metrics", "soft"], "test.jsonl:1"),
        (["--tasks", "gsm8k", "--metrics", "exact"], "test.jsonl:1"),
        (["--tasks", "gsm8k", "--metrics", "cot"], "test.jsonl:1"),
    ):
        assert main([*command, "--data", str(data), *options]) == 2
        assert f"{name}: the model's tokenizer can't encode it: " in capsys.readouterr().err
