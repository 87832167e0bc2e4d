"""Files of problems that cannot be used: the message has the file and line, what is wrong and what would be right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quietstar.config.loops import ProblemOptions
from quietstar.errors import DataError
from quietstar.tasks import Split, load_task

GOOD = '{"question": "One?", "answer": "1 #### 1"}'
CHOICES = [{"label": label, "text": label} for label in "ABCDE"]


def told(task: str, path: Path, split: Split = "train", **options: Any) -> str:
    with pytest.raises(DataError) as error:
        load_task(task, ProblemOptions(path=str(path), **options)).problems(split)
    return str(error.value).replace(f"{path}", "PATH")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "Two?"}', "has no field 'answer' (its fields: 'question')"),
        ('{"question": "  ", "answer": "#### 2"}', "field 'question' has no text in it"),
        ('{"question": 2, "answer": "#### 2"}', "field 'question' is a JSON number, needs a string"),
        ('{"question": null, "answer": "#### 2"}', "field 'question' is a JSON null, needs a string"),
        ('{"question": "\\ud800", "answer": "#### 2"}', "field 'question' contains half a surrogate pair"),
        ('{"question": "Two?", "answer": "2"}', "field 'answer' has no number to read, needs a line '#### 72'"),
        ('{"question": "Two?", "answer": "#### two"}', "field 'answer' has no number to read, needs a line '#### 72'"),
        ('{"question": "Two?"', "not valid JSON: Expecting ',' delimiter at column 20; needs one object per line"),
        ("[1, 2]", "holds a JSON array, needs an object with the fields of a problem"),
        ("[" * 100_000, "not usable JSON: nested too deeply"),
    ],
)
def test_lines_that_are_no_problem(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(f"{GOOD}\n\n{line}\n")
    assert told("gsm8k", file).startswith(f"PATH:3: {message}")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(GOOD.encode() + b'\n{"question": "\xff"}')
    assert told("gsm8k", file) == "PATH:2: not UTF-8 text: invalid start byte, 0xff at byte 15 of the line"


def test_ids_that_are_not_unique(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps({"question": "?", "answer": 1, "id": name}) for name in ("a", "b", "a")))
    assert told("jsonl", file, id="id") == "PATH:3: the id 'a' is that of PATH:1 already; each problem needs its own"


def test_fields_that_options_name(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(GOOD)
    message = "PATH:1: has no field 'query' (its fields: 'question', 'answer'); problems.question names the one to read"
    assert told("jsonl", file, question="query") == message
    file.write_text('{"question": "?", "answer": "one\\ntwo"}')
    assert told("jsonl", file).startswith("PATH:1: field 'answer' has several lines, none of which gives the final")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    assert told("gsm8k", tmp_path / "no") == "problems.path: PATH: no such file or directory"
    message = "problems.path: PATH has no train problems: needs train_rand_split.jsonl"
    assert told("commonsenseqa", tmp_path) == message
    (tmp_path / "mine.jsonl").write_text(GOOD)
    missing = told("gsm8k", tmp_path / "mine.jsonl", "test")
    assert missing.endswith("has no test problems: needs test.jsonl; problems.test_path names another file")
    assert (
        told("gsm8k", tmp_path, "test", test_path="/no/such")
        == "problems.test_path: /no/such: no such file or directory"
    )
    shots = told("gsm8k", tmp_path / "mine.jsonl", "test", test_path=str(tmp_path / "few"))
    assert shots.startswith("problems.test_path: ")


def test_files_without_problems(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text("\n\n")
    assert told("gsm8k", file) == "gsm8k: has no train problems, 0 were left out; needs at least one"
    file.write_text(json.dumps({"problem": "?", "solution": r"\boxed{x}"}))
    assert told("math", file) == "math: has no train problems, 1 were left out; needs at least one"
    file.write_text(json.dumps({"problem": "?", "solution": "x"}))
    assert told("math", file) == "PATH:1: field 'solution' has no answer to read, needs one in \\boxed{...}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answerKey": "F"}, "PATH:1: field 'answerKey' is 'F', needs the label of one of the choices (A, B, C, D, E)"),
        ({"choices": CHOICES[:4]}, "PATH:1: the choices are labelled A, B, C, D, needs A, B, C, D, E"),
        ({"choices": None}, "PATH:1: has no list 'choices', needs objects with the fields 'label' and 'text'"),
        ({"choices": {"label": ["A"], "text": []}}, "PATH:1: choice 1: field 'text' is a JSON null, needs a string"),
        ({"question": {"choices": CHOICES}}, "PATH:1: question: has no field 'stem' (its fields: 'choices')"),
    ],
)
def test_questions_without_their_choices(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"id": "1", "question": "?", "answerKey": "A", "choices": CHOICES, **change}))
    assert told("commonsenseqa", file) == message


def test_few_shot_files_that_cannot_be_used(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(DataError, match=r"problems\.few_shot_path: .*none: cannot be read: No such file"):
        load_task("gsm8k", ProblemOptions(few_shot_path=str(tmp_path / "none"))).few_shot()
    with pytest.raises(DataError, match=r"problems\.few_shot_hint_path: .*empty.txt: has no text in it"):
        load_task("addition", ProblemOptions(few_shot_hint_path=str(empty))).few_shot(hint=True)
