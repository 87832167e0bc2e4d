"""What `quietstar.evaluate` refuses, before it loads a model wherever it can."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from quietstar.evaluate import main
from quietstar.reporting.evaluation_page import evaluation_page
from tests.evaluation.evaluated import constant_model, save, tokenizer, write_problems

NO_MODEL = "/nowhere"


def refused(capsys: pytest.CaptureFixture[str], checkpoint: str | Path, out: Path, **options: Any) -> str:
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main([str(checkpoint), "--output_dir", str(out), "--device", "cpu", *words]) == 2
    return capsys.readouterr().err


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_problems(tmp_path / "data", ["7", "8"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tasks": "gms8k"}, "tasks: got 'gms8k', needs some of gsm8k, commonsenseqa; did you mean gsm8k?"),
        ({"tasks": "gsm8k", "metrics": "sofd"}, "metrics: got 'sofd', needs some of soft, exact, cot; did you mean"),
        ({"tasks": "gsm8k,gsm8k"}, "tasks: got gsm8k, gsm8k, needs each once"),
        ({"tasks": "gsm8k", "metrics": ""}, "metrics: none given"),
        ({}, "nothing to evaluate; needs --tasks, --text or --lm_eval"),
        ({"tasks": "gsm8k", "problems": "0"}, "problems: got 0, needs at least 1"),
        ({"tasks": "gsm8k", "problems": "-3"}, "problems: got -3, needs at least 1"),
        ({"tasks": "gsm8k", "votes": "0"}, "votes: got 0, needs at least 1"),
        ({"tasks": "gsm8k", "batch_size": "-1"}, "batch_size: got -1, needs at least 1"),
        ({"tasks": "gsm8k", "max_new_tokens": "0"}, "max_new_tokens: got 0, needs at least 1"),
        ({"tasks": "gsm8k", "length": "1"}, "length: got 1, needs at least 2"),
        ({"tasks": "gsm8k", "temperature": "0"}, "temperature: got 0.0, needs a finite number above 0"),
        ({"tasks": "gsm8k", "think": "never"}, "think: got never, which is what thinking is compared with"),
        ({"tasks": "gsm8k", "think": "allways"}, "think: got 'allways'"),
        ({"text": "/nowhere.txt"}, "text: /nowhere.txt: no such file or directory"),
    ],
)
def test_options(options: dict[str, str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in refused(capsys, NO_MODEL, tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("file", "line", "told"),
    [
        ("gsm8k/test.jsonl", {"question": "What?"}, ":3: has no field 'answer' (its fields: 'question')"),
        ("gsm8k/test.jsonl", {"question": "What?", "answer": "none"}, ":3: field 'answer' has no number to read"),
        ("commonsenseqa/dev_rand_split.jsonl", {"id": "z", "question": {}}, ":3: has no field 'answerKey'"),
    ],
)
def test_rows(
    file: str, line: dict[str, Any], told: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (data / file).open("a") as rows:
        rows.write(json.dumps(line) + "\n")
    task = file.partition("/")[0]
    assert f"{data / file}{told}" in refused(capsys, NO_MODEL, tmp_path / "out", tasks=task, data=data)


def test_text_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "binary").write_bytes(b"ab\xff")
    assert "binary: not UTF-8 text: invalid start byte, 0xff at byte 3" in refused(
        capsys, NO_MODEL, tmp_path / "out", text=tmp_path / "binary"
    )
    (tmp_path / "empty").write_text("\n")
    assert "empty: no text in it" in refused(capsys, NO_MODEL, tmp_path / "out", text=tmp_path / "empty")


def test_a_directory_that_cannot_be_written(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    told = refused(capsys, NO_MODEL, tmp_path / "file" / "out", tasks="gsm8k", data=data)
    assert "output_dir: cannot write to" in told


def test_one_file_for_two_tasks(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = data / "gsm8k" / "test.jsonl"
    told = refused(capsys, NO_MODEL, tmp_path / "out", tasks="gsm8k,commonsenseqa", data=file)
    assert "is one file, needs a directory for 2 tasks" in told


def test_a_plain_model(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = constant_model({"7": 0.5}).base
    base.set_attn_implementation("sdpa")
    plain = save(base, tmp_path / "plain")
    assert "so it can't think" in refused(capsys, plain, tmp_path / "out", tasks="gsm8k", data=data)


def test_a_gate_that_is_not_there(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(constant_model({"7": 0.5}), tmp_path / "model")
    told = refused(capsys, model, tmp_path / "out", tasks="gsm8k", data=data, think="learned")
    assert "has no learned gate" in told


def test_nothing_fits_into_the_context(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(constant_model({"7": 0.5}), tmp_path / "model")
    for metric in ("exact", "cot"):
        options = {"tasks": "gsm8k", "data": data, "metrics": metric, "max_new_tokens": 600}
        assert "no problem fits into the model's context" in refused(capsys, model, tmp_path / "out", **options)
    (tmp_path / "text").write_text("word " * 200)
    told = refused(capsys, model, tmp_path / "out", text=tmp_path / "text", length=600)
    assert "length: got 600, the model's context leaves room for 508" in told


def test_lm_eval_that_is_not_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    told = refused(capsys, NO_MODEL, tmp_path / "out", lm_eval="hellaswag")
    assert "lm_eval: lm-eval is not installed; pip install 'quietstar[eval]'" in told


def test_the_page_escapes_what_it_shows() -> None:
    evil = "<script>alert(1)</script>"
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6, "problems": 3}
    row = {
        **{"metric": evil, "of": evil, "statement": evil, "unit": "share", "n": 3, "skipped": 1},
        **{"off": interval, "on": interval, "difference": interval, "higher_is_better": True},
        **{
            "resampled": "problems",
            "skipped_because": evil,
            "seconds": {"off": 1.0, "on": 2.0},
            "generated": {"on": {"tokens": 9, "tokens_per_second": 4.5, "thought_at": 0.5}},
            "groups": {},
            "caveats": {},
        },
    }
    report = {"checkpoint": evil, "results": [row], "settings": {"text": evil}, "tasks": {}, "environment": {}}
    html = evaluation_page(report, "thoughts.html")
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "default-src 'none'" in html and "http" not in html.replace("http-equiv", "")


def test_the_tokenizer_is_that_of_the_helpers() -> None:
    """The distributions of these tests are written for one token a character."""
    assert tokenizer()("7 A\n")["input_ids"] == [7, *tokenizer()(" A\n")["input_ids"]]
