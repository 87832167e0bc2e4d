"""MATH: numbers in boxes, what is left out, and what other expressions equal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quietstar.config.loops import ProblemOptions
from quietstar.tasks import Problem, Task
from quietstar.tasks.math_numeric import MathNumeric, transfer_problems
from quietstar.tasks.numbers import last_box, latex_number

HALF = Problem("1", "How much?", "0.5")


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"so $x=\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1} and then \boxed{\text{a \{ brace}}", r"\text{a \{ brace}"),
        (r"$\fbox{3}$", "3"),
        (r"$x = \boxed 5$.", "5"),
        (r"\boxed{never closed", None),
        ("no box", None),
    ],
)
def test_the_last_box_with_its_nested_braces(text: str, box: str | None) -> None:
    assert last_box(text) == box


@pytest.mark.parametrize(
    ("written", "number"),
    [
        (r"\frac{7}{2}", "3.5"),
        (r"-\dfrac12", "-0.5"),
        (r"\tfrac{-1}{3}", "-1/3"),
        (r"1\frac{1}{4}", "1.25"),
        (r"\$32,\!348", "32348"),
        (r"1{,}000", "1000"),
        (r"90^\circ", "90"),
        (r"12.5\%", "12.5"),
        (r"864 \mbox{ inches}^2", "864"),
        (r"5\text{ million}", None),
        (r"5\text{ or }6", None),
        (r"5x", None),
        (r"2\sqrt3", None),
        (r"3\pi", None),
        (r"101_2", None),
        (r"(1,2)", None),
        (r"\text{(A)}", None),
    ],
)
def test_numbers_in_latex(written: str, number: str | None) -> None:
    assert latex_number(written) == number


@pytest.fixture
def task(tmp_path: Path) -> MathNumeric:
    rows = [
        {"problem": "Half?", "solution": r"\boxed{\frac12}", "subject": "Algebra", "level": 1, "unique_id": "a/1"},
        {"question": "Root?", "answer": r"\boxed{\sqrt{2}}", "type": "Algebra", "level": "Level 2"},
        {"input": "Third?", "output": r"\boxed{3}", "answer": "3"},
    ]
    folder = tmp_path / "train_some"
    folder.mkdir()
    (folder / "algebra.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "one.json").write_text(
        json.dumps({"problem": "Four?", "solution": r"\boxed{4}", "type": "Geometry"}, indent=1)
    )
    return MathNumeric(ProblemOptions(path=str(tmp_path)))


def test_problems_with_other_answers_are_left_out_and_counted(task: MathNumeric) -> None:
    found = [(problem.id, problem.answer, problem.group) for problem in task.problems("train")]
    assert found == [("a/1", "0.5", "Algebra, Level 1"), ("3", "3", ""), ("4", "4", "Geometry")]
    assert task.left_out == {"train": 1}


def test_the_hint_is_the_number_and_either_way_to_answer_counts(task: MathNumeric) -> None:
    problem = task.problems("train")[0]
    assert task.prompt(problem, hint=True) == "Q: Half? (0.5)\nA:"
    for completion in (r" It is $\boxed{\frac{2}{4}}$.", " It is\n#### .5", r"$\boxed{0.50}$"):
        assert task.check(problem, completion).correct
    for completion in (r" It is $\boxed{\frac{2}{3}}$.", " It is 0.5.", r"\boxed{-0.5}"):
        assert not task.check(problem, completion).correct


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r" It is $\boxed{5}$.", "5"),
        (" First $\\boxed{2}$,\nthen $\\boxed{\\frac{1}{2}}$.", "0.5"),
        (" So\n\\[\n\\boxed{5}\n\\]", "5"),
        ("\\boxed{5\n}", "5"),
        (r" \boxed{cut off, \boxed{5}", "5"),
        (" It is\n#### 5", "5"),
        (r"#### $\boxed{5}$", "5"),
    ],
)
@pytest.mark.parametrize(
    "more",
    ["", "\n\nProblem: 1 + 1\nIt is $\\boxed{2}$.", "\n \n\\boxed{7", "\n\n#### 3", " \n\n\\boxed{2}\n\n\\boxed{3}"],
)
def test_what_runs_on_changes_no_answer_and_is_not_trained_on(
    task: MathNumeric, solution: str, answer: str, more: str
) -> None:
    assert task.extract(solution + more) == answer
    assert task.accepted(solution + more) == solution


def test_sympy_decides_what_is_no_number(task: MathNumeric) -> None:
    assert task.check(HALF, r"\boxed{\frac{\sqrt{4}}{4}}").correct
    assert task.check(HALF, r"\boxed{\frac{\sqrt{4}}{4}}").answer == "0.5"
    assert not task.check(HALF, r"\boxed{\frac{\sqrt{5}}{4}}").correct
    assert not task.check(HALF, r"\boxed{\frac{}{}").correct


def test_all_gold_answers_verify_against_themselves_but_for_three_with_a_box_in_an_earlier_paragraph(
    math: Task,
) -> None:
    """A box within a drawing, the sizes of three angles, and `Note: 3 is also accepted as an answer`."""
    assert isinstance(math, MathNumeric)
    counts = {split: (len(math.problems(split)), math.left_out[split]) for split in ("train", "test")}
    assert counts == {"train": (4219, 370), "test": (4067, 933)}
    known = {"train": ["2382"], "test": ["334", "4563"]}
    other = {problem.question for split in known for problem in math.problems(split) if problem.id in known[split]}
    for problem in [*math.problems("train"), *math.problems("test")]:
        solution = math.solution(problem)
        assert solution is not None
        assert math.check(problem, solution).correct is (problem.question not in other), problem.place


def test_transfer_problems_are_about_as_many_as_published(math: Task) -> None:
    """V-STaR's paper has 150 and does not list them."""
    chosen = transfer_problems(math.problems("test"))
    assert len(chosen) == 158
    assert all(problem.group.endswith("Level 1") and "\\" not in problem.question for problem in chosen)


@pytest.mark.parametrize(
    ("gold", "box", "correct"),
    [
        ("89", "8 9", False),
        ("89", r"8\ 9", False),
        ("56", r"5\quad 6", False),
        ("456", r"4\;5\;6", False),
        ("15", "{1}{5}", False),
        ("5", "{1}{5}", False),
        ("15", "1{}5", False),
        ("1.5", "1 .5", False),
        ("24", "4!!", False),
        ("6", r"\log_2 64", True),
        ("3", r"\frac 6 2", True),
        ("7000", r"7\,000", True),
    ],
)
def test_white_space_makes_no_number_of_two(task: MathNumeric, gold: str, box: str, correct: bool) -> None:
    """Without their spaces, `8 9` was 89 and the logarithm was that of a base of many digits."""
    assert task.check(Problem("1", "How much?", gold), rf"\boxed{{{box}}}").correct is correct


@pytest.mark.parametrize(
    "name", ["PQR", "g(2)", "a_{10}", "P(B)", "|z|", r"\text{Perimeter}", r"\angle QPR", r"m\angle B", r"\overline{XY}"]
)
def test_the_name_of_a_value_is_no_part_of_it(task: MathNumeric, name: str) -> None:
    problem = Problem("1", "How much?", "8")
    assert task.check(problem, rf"\boxed{{{name} = 8}}").correct
    for changed in (f"2{name}", f"-{name}", rf"\sqrt{{{name}}}", f"{name}^2", f"{name} + 1", rf"\log {name}"):
        assert not task.check(problem, rf"\boxed{{{changed} = 8}}").correct, changed
    assert not task.check(problem, rf"\boxed{{{name} = 7}}").correct


@pytest.mark.parametrize(
    ("box", "correct"), [("3+5=8", True), ("2^3 = 8", True), ("9 = 8", False), ("3+4=8", False), ("8 = 9", False)]
)
def test_an_equation_of_numbers_has_to_be_true(task: MathNumeric, box: str, correct: bool) -> None:
    assert task.check(Problem("1", "How much?", "8"), rf"\boxed{{{box}}}").correct is correct
