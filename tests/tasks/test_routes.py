"""Routes between numbers: what is right, what votes are about, and which problems are held out."""

from __future__ import annotations

import itertools

import pytest

from quietstar.config.loops import ProblemOptions
from quietstar.errors import ConfigError
from quietstar.tasks import Problem, load_task
from quietstar.tasks.routes import FEWEST_ROUTES, SOLVED, _all_routes
from quietstar.tasks.task import Task

PROBLEM = Problem("07>58", "07>58", "58")


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("routes", ProblemOptions(per_group=600, test_per_group=300))


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("*9=63-8=55+3=58", "*9-8+3", True),
        ("+3=10*6=60-2=58", "+3*6-2", True),
        ("*9=63-8=54+4=58", "*9-8+4", False),  # a wrong difference
        ("*9=63-8=55+3=57", "*9-8+3", False),  # a wrong sum
        ("*9=63-7=56+2=58!", None, False),
        ("*8=56-2=54+5=59", "*8-2+5", False),  # right steps to another number
        ("*8=56+9=65-7=58", "*8+9-7", True),
        ("*8=56-1=55+3=58", "*8-1+3", False),  # 1 is no operand
        ("+9=16+9=25*2=50", "+9+9*2", False),  # no subtraction
        ("*9=63+9=72-14=58", None, False),
        ("*9=63+9=72-8=64", "*9+9-8", False),  # above 70 on the way
        ("*9=63-8=055+3=58", None, False),
        ("", None, False),
    ],
)
def test_a_route_is_right_when_every_step_is_and_it_arrives(
    task: Task, completion: str, answer: str | None, right: bool
) -> None:
    verdict = task.check(PROBLEM, completion)
    assert (verdict.answer, verdict.correct) == (answer, right)
    assert task.right_inside(PROBLEM, completion) is right
    assert "".join(task.steps(completion)) == completion


def test_all_routes_of_every_problem_are_right_and_there_are_many(task: Task) -> None:
    for problem in itertools.chain(task.problems("train")[:20], task.problems("test")[:20]):
        start, target = map(int, problem.id.split(">"))
        routes = _all_routes()[start, target]
        assert len(set(routes)) >= FEWEST_ROUTES
        assert all(task.check(problem, route).correct for route in routes)
        assert len({task.check(problem, route).answer for route in routes}) == len(routes)


def test_held_out_problems_are_the_same_for_every_seed_and_no_others(task: Task) -> None:
    other = load_task("routes", ProblemOptions(per_group=600, test_per_group=300, seed=1))
    assert task.problems("test") == other.problems("test")
    assert {one.id for one in task.problems("train")}.isdisjoint(one.id for one in task.problems("test"))
    assert task.problems("train") != other.problems("train")


def test_human_solutions_are_right_and_pretraining_lines_are_arithmetic(task: Task) -> None:
    shown = task.demonstrations()
    assert len(shown) == SOLVED
    by_id = {one.id: one for one in task.problems("train")}
    assert all(task.check(by_id[one.problem], one.completion).correct for one in shown)
    lines = task.pretraining()
    assert {line.prompt for line in lines}.isdisjoint(task.prompt(problem) for problem in task.problems("test"))
    assert set("".join(line.prompt + line.completion for line in lines)) <= set(task.symbols)
    for line in lines[:200]:
        start, target = map(int, line.prompt[:-1].split(">"))
        for step in task.steps(line.completion):
            left, result = step.split("=")
            start = eval(f"{start}{left}")  # of digits and an operation that the task itself has written
            assert start == int(result)
        assert start == target


def test_more_problems_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"problems\.per_group: got 2000, but there are \d+ problems"):
        load_task("routes", ProblemOptions(per_group=2000))
