"""Any questions with answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quietstar.config.loops import ProblemOptions
from quietstar.errors import ConfigError
from quietstar.tasks import Task, load_task


def make(path: Path, *rows: dict[str, Any], **options: Any) -> Task:
    file = path / "problems.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return load_task("jsonl", ProblemOptions(path=str(file), **options))


def test_fields_are_named_by_options_and_numbers_stay_as_they_were_written(tmp_path: Path) -> None:
    row = {"stem": "How much?", "gold": 0.1, "why": "A tenth.", "name": 7}
    task = make(tmp_path, row, question="stem", answer="gold", rationale="why", id="name")
    (problem,) = task.problems("train")
    assert (problem.id, problem.question, problem.answer) == ("7", "How much?", "0.1")
    assert task.prompt(problem) == "Q: How much?\nA:"
    assert task.prompt(problem, hint=True) == "Q: How much? (0.1)\nA:"
    assert task.solution(problem) == " A tenth.\n#### 0.1"
    assert problem.place.endswith("problems.jsonl:1")


@pytest.mark.parametrize(
    ("gold", "completion", "correct"),
    [
        ("1,000", " 999 + 1\n#### $1000.00", True),
        ("1000", " 999 + 1\nAnswer: 1,000", True),
        ("1000", " Answer: \nanswer: 1000\n", True),
        ("1000", " Answer: 5\nanswer: 1000\n", False),
        ("1000", " Answer: 5\n#### 1000\nAnswer: 7", True),
        ("1000", " The answer: 1000", False),
        ("Paris", " It is\n#### paris.", True),
        ("New  York", " It is\n#### new york", True),
        ("Paris", " It is\n#### Rome", False),
        ("#### 5", " It is\n#### five", False),
        ("Long.\n#### 5", " It is\n#### 5", True),
        ("5", "", False),
        ("x=5", "#### 6", False),
        ("x = 5", "#### 5", True),
        ("5", "#### x = 5 apples", True),
        ("x = 5", "#### y = 5", False),
        ("y = x+1", "#### z = x+1", False),
        ("y = x+1", "#### x + 1", True),
        ("y = x+1", "#### 1+x = y", True),
        ("x = 5, y = 6", "#### x = 6, y = 5", False),
    ],
)
def test_answers_are_compared_as_numbers_or_as_plain_texts(
    tmp_path: Path, gold: str, completion: str, correct: bool
) -> None:
    task = make(tmp_path, {"question": "?", "answer": gold})
    assert task.check(task.problems("train")[0], completion).correct is correct


@pytest.mark.parametrize("solution", [" 2+3\n#### 5", " 2+3\nAnswer: 5", " ####\nAnswer: 5"])
@pytest.mark.parametrize("more", ["", "\nAnswer: 7", "\n\nMore:\nanswer: 7\nAnswer: 8"])
def test_what_runs_on_changes_no_answer_and_is_not_trained_on(tmp_path: Path, solution: str, more: str) -> None:
    task = make(tmp_path, {"question": "?", "answer": "5"})
    assert task.extract(solution + more) == "5"
    assert task.accepted(solution + more) == solution


def test_expressions_are_compared_by_their_meaning(tmp_path: Path) -> None:
    task = make(tmp_path, {"question": "?", "answer": "(x+1)^2"})
    (problem,) = task.problems("train")
    verdict = task.check(problem, "#### x^2+2x+1")
    assert (verdict.correct, verdict.answer) == (True, "(x+1)^2")
    assert not task.check(problem, "#### x^2+1").correct
    assert task.isolated


def test_a_rationale_that_has_its_answer_keeps_it(tmp_path: Path) -> None:
    task = make(tmp_path, {"question": "?", "answer": "5", "why": "2+3\n#### 5"}, rationale="why")
    assert task.solution(task.problems("train")[0]) == " 2+3\n#### 5"


def test_without_a_path_there_is_nothing_to_read() -> None:
    with pytest.raises(ConfigError, match=r"problems\.path: missing; the task jsonl needs a file"):
        load_task("jsonl", ProblemOptions()).problems("train")


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        *(("15-30", "-15"), ("4-1", "3"), ("3", "4-1"), ("867-5309", "-4442"), ("2019-02-03", "2014"), ("$5-$8", "-3")),
        *(("6/7/2021", "6/14147"), ("7 ft", "7 in"), ("9 mg", "9 kg"), ("8 am", "8 pm"), ("30 C", "30 F")),
        *(("4 cats", "4 dogs"), ("€7", "7 dollars"), ("6 m^2", "6 m"), ("6 m/s", "6 m"), ("6 m/s", "6 s/m")),
        *(("3 red cars", "3 blue cars"), ("2 left", "2 right"), ("3Y", "3y"), ("g(4)", "4g"), ("P(3)", "3P")),
        *(("area = 9", "volume = 9"), ("x = 1/4", "z = 0.25"), ("m = 2", "M = 2"), ("20 in", "20 cm")),
    ],
)
def test_a_range_a_unit_a_name_and_the_case_of_a_symbol_count(tmp_path: Path, gold: str, answer: str) -> None:
    """`10-20` was -10, `5 km` equalled `5 m` because units were dropped from both, and `2X` was `2x`."""
    task = make(tmp_path, {"question": "?", "answer": gold})
    assert not task.check(task.problems("train")[0], f"#### {answer}").correct
    task = make(tmp_path, {"question": "?", "answer": answer})
    assert not task.check(task.problems("train")[0], f"#### {gold}").correct


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        *(("15-30", "15 \u2013 30"), ("7 feet", "7 ft"), ("7 ft", "7"), ("9 kilograms", "9 kg"), ("8 pm", "8 PM")),
        *(
            ("30 °C", "30 degrees Celsius"),
            ("4 cats", "4 black cats"),
            ("7 euros", "€7.00"),
            ("6 m²", "6 square meters"),
        ),
        *(
            ("6 km/h", "6 kilometers per hour"),
            ("4 children", "4 child"),
            ("12%", "12 percent"),
            ("9 years", "9 years old"),
        ),
        *(("area = 9", "9"), ("y<3", "y < 3"), ("Rome", r"\text{Rome}"), ("Rome", "**Answer:** Rome"), ("7", "9-2=7")),
        *(
            ("60", "Total: 60"),
            ("60", r"$\$60$"),
            ("60", r"\boldsymbol{60}"),
            ("60", "((60))"),
            ("60", "60 clips in total"),
        ),
        *(("Apollo 11", "apollo 11"), ("4 Ab", "4 ab"), ("5 inches", "5 in"), ("2 pennies", "2 penny")),
        *(("20 C", "20 degrees C"), ("$6/hour", "$6 an hour"), ("3 GB", "3 GB in total"), ("4 Cats", "4 cats")),
    ],
)
def test_the_same_answer_in_other_words(tmp_path: Path, gold: str, answer: str) -> None:
    task = make(tmp_path, {"question": "?", "answer": gold})
    assert task.check(task.problems("train")[0], f"#### {answer}").correct
