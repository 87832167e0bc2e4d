"""Every gold answer of the data sets, in the conclusions that people write, is read as itself and as no neighbour.

Run with `-s` the tests print how many readings agree.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import pytest

from quietstar.config.loops import ProblemOptions
from quietstar.evaluation.answers import AnswerFormat, load_format
from quietstar.tasks.registry import load_task
from quietstar.tasks.task import Problem, Task

Read = Callable[[AnswerFormat, Problem, str], str]
DIRECT: Read = lambda form, problem, text: form.for_checker(text)  # noqa: E731 - three names for three readings
LENIENT: Read = lambda form, problem, text: form.lenient(problem, text)  # noqa: E731
CONCLUDED: Read = lambda form, problem, text: form.concluded(text)  # noqa: E731


@pytest.fixture(scope="module")
def data() -> Path:
    if "QUIETSTAR_DATA" not in os.environ:
        pytest.skip("QUIETSTAR_DATA does not name the folder of data sets that are not shipped")
    return Path(os.environ["QUIETSTAR_DATA"])


def all_problems(task: Task) -> list[Problem]:
    return [*task.problems("train"), *task.problems("test")]


def neighbours(problems: Iterable[Problem]) -> Iterable[tuple[Problem, Problem]]:
    """Each problem with the next one of another answer; after the last one the list begins again."""
    ahead: list[Problem] = []
    problems = [*problems]
    first = next(one for one in problems if one.answer != problems[-1].answer)
    for one, other in pairwise([*problems, first]):
        ahead.append(one)
        if one.answer != other.answer:
            yield from ((earlier, other) for earlier in ahead)
            ahead = []


def readings(form: AnswerFormat, read: Read, written: str, parts: Callable[[Problem], dict[str, str]]) -> list[str]:
    """Returns the texts that are not read as their gold, or are read as a neighbour's."""
    wrong, tried = [], 0
    for problem, other in neighbours(all_problems(form.task)):
        text = written.format(**parts(problem))
        found = read(form, problem, text)
        tried += 1
        if not form.task.check(problem, found).correct or form.task.check(other, found).correct:
            wrong.append(f"{problem.place}: {text!r} read as {found!r}")
    print(f"{form.task.name}, {written!r}: {tried - len(wrong):,} agree, {len(wrong):,} do not")
    assert tried > 8000
    return wrong


def number_parts(problem: Problem) -> dict[str, str]:
    value = int(problem.answer)
    return {"gold": problem.answer, "commas": f"{value:,}", "other": str(value + 7)}


@pytest.mark.parametrize(
    ("read", "written"),
    [
        (DIRECT, " {gold}\n"),
        (DIRECT, " {commas}.\nQ: What is {other}?"),
        (DIRECT, " ${gold}.00\n"),
        (DIRECT, " They have {other}.\n#### {gold}\nSo {other}."),
        (LENIENT, " First {other}. The answer is {gold}."),
        (LENIENT, " So the answer is: **{commas}**"),
        (LENIENT, " There were {other} before. #### {gold}"),
        (LENIENT, " We get {other}, and then $\\boxed{{{gold}}}$."),
        (LENIENT, " {other} is too much. Therefore, {commas} apples."),
        (LENIENT, " {gold} + {other} - {other} = ${commas}\n\nQ: And {other}?"),
        (CONCLUDED, " {gold}."),
        (CONCLUDED, ": ${commas}, not {other}."),
        (CONCLUDED, " **{gold}** dollars.\n\n{other}"),
        (CONCLUDED, " \\boxed{{{gold}}}, since {other} is too much."),
    ],
)
def test_gold_numbers_are_read_in_every_conclusion(read: Read, written: str, data: Path) -> None:
    assert readings(load_format("gsm8k", data), read, written, number_parts) == []


def letter_parts(problem: Problem) -> dict[str, str]:
    choices = {line[1]: line[4:] for line in problem.question.split("\n")[-5:]}
    return {"gold": problem.answer.upper(), "low": problem.answer, "text": choices[problem.answer]}


@pytest.mark.parametrize(
    ("read", "written"),
    [
        (DIRECT, " {gold}\n"),
        (DIRECT, " ({low}) and no other.\nQ: Why?"),
        (DIRECT, " People do so. Therefore, the answer is {text} ({low}).\n\nQ:"),
        (DIRECT, " So the answer is {gold}."),
        (LENIENT, " The answer is ({gold})."),
        (LENIENT, " So the answer is: **{gold}**"),
        (LENIENT, " Therefore, {gold}."),
        (LENIENT, " Hence it has to be ({low})."),
        (CONCLUDED, " {gold}."),
        (CONCLUDED, ": ({low}) {text}."),
        (CONCLUDED, " **{gold}**\nThat is all."),
        (CONCLUDED, " \\boxed{{{gold}}}."),
    ],
)
def test_gold_letters_are_read_in_every_conclusion(read: Read, written: str, data: Path) -> None:
    assert readings(load_format("commonsenseqa", data), read, written, letter_parts) == []


@pytest.mark.parametrize(
    "written",
    [
        " We get 1, thus $\\boxed{{{gold}}}$.",
        " Thus \\boxed{{x = {gold}}}",
        " The answer is $\\boxed{{{gold}\\text{{ cm}}}}$.",
        " First 1.\n#### {gold}",
    ],
)
def test_gold_numbers_of_math_are_read_in_every_conclusion(written: str, data: Path) -> None:
    """`evaluate` does not ask MATH; the loops do."""
    task = load_task("math", ProblemOptions(path=str(data / "math")))
    wrong = [
        text
        for problem, other in neighbours(all_problems(task))
        for text in [written.format(gold=problem.answer)]
        if not task.check(problem, text).correct or task.check(other, text).correct
    ]
    print(f"math, {written!r}: {len(wrong):,} do not agree")
    assert wrong == []
