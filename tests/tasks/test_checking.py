"""Checks that hang, raise, exit, crash or take all memory become verdicts; the caller never notices."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from quietstar.config.loops import ProblemOptions
from quietstar.errors import ConfigError
from quietstar.tasks import Checker, Problem, Task, Verdict, load_task
from quietstar.tasks.jsonl import QuestionsAndAnswers

OWN_TASK = """
import ctypes, os, sys, time

from quietstar.tasks import Problem, Task, Verdict


class Own(Task):
    name = "own"

    def problems(self, split):
        return [Problem("1", "?", "1")]

    def prompt(self, problem, hint=False):
        return "?"

    def extract(self, completion):
        return completion

    def check(self, problem, completion):
        print("noise that is no reply")
        if completion == "hang":
            time.sleep(1000)
        if completion == "raise":
            raise ValueError("no such\\nthing")
        if completion == "exit":
            sys.exit(3)
        if completion == "os._exit":
            os._exit(7)
        if completion == "segfault":
            ctypes.string_at(0)
        if completion == "memory":
            bytearray(2**36)
        if completion == "none":
            return None
        if completion == "number":
            return Verdict(1, True)
        if completion == "input":
            input()
        if completion == "pid":
            return Verdict(str(os.getpid()), True)
        if completion == "torch":
            return Verdict(str(not {"torch", "transformers"}.isdisjoint(sys.modules)), True)
        return super().check(problem, completion)


def make(options):
    return Own()
"""

FAILURES = {
    "raise": "the check raised ValueError: no such thing",
    "exit": "the check raised SystemExit: 3",
    "os._exit": "the check ended its process with status 7",
    "segfault": "the check ended its process by SIGSEGV",
    "memory": "the check raised MemoryError",
    "none": "the check raised TypeError: check returned a NoneType, needs a Verdict",
    "number": "the check raised TypeError: check found an answer of type int, needs a str or None",
    "input": "the check raised EOFError: EOF when reading a line",
    "hang": "the check took more than 3 s and was stopped",
}
PROBLEM = Problem("1", "?", "1")


@pytest.fixture
def own_task(tmp_path: Path) -> Task:
    (tmp_path / "own.py").write_text(OWN_TASK)
    return load_task(f"{tmp_path / 'own.py'}:make", ProblemOptions())


def test_whatever_a_check_does_is_a_verdict_and_the_others_are_judged(own_task: Task) -> None:
    completions = ["1", *FAILURES, "2", "1"]
    with Checker(own_task, 3, workers=2) as checker:
        verdicts = checker.check([(PROBLEM, completion) for completion in completions])
    failed = {name: Verdict(None, False, failure) for name, failure in FAILURES.items()}
    judged = {"1": Verdict("1", True), "2": Verdict("2", False)}
    assert verdicts == [{**failed, **judged}[completion] for completion in completions]


def test_workers_are_light_stay_for_many_checks_and_are_gone_afterwards(own_task: Task) -> None:
    with Checker(own_task, 5) as checker:
        assert checker.check([]) == []
        (pid, again, torch) = [checker.check([(PROBLEM, name)])[0].answer for name in ("pid", "pid", "torch")]
        assert pid == again
        assert torch == "False"
        os.kill(int(pid or 0), 0)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid or 0), 0)


def test_a_symbolic_check_that_would_take_for_ever(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"question": "?", "answer": "x^2"}')
    task = load_task("jsonl", ProblemOptions(path=str(tmp_path)))
    (problem,) = task.problems("train")
    began = time.monotonic()
    with Checker(task, 3) as checker:
        fine, hangs = checker.check([(problem, "#### x*x"), (problem, "#### 2003^{2002^{2001}}")])
    assert fine == Verdict("x^2", True)
    assert not hangs.correct
    assert time.monotonic() - began < 20


def test_tasks_of_plain_comparisons_are_checked_in_this_process(own_task: Task) -> None:
    own_task.isolated = False
    with Checker(own_task, 5) as checker:
        here, raised = checker.check([(PROBLEM, "pid"), (PROBLEM, "raise")])
    assert here.answer == str(os.getpid())
    assert raised == Verdict(None, False, FAILURES["raise"])


def test_what_a_worker_cannot_make_is_refused(own_task: Task, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"make it with quietstar\.tasks\.load_task, or set"):
        Checker(type(own_task)(), 1)
    (tmp_path / "own.py").write_text("raise RuntimeError('changed since')")
    with (
        Checker(own_task, 1) as checker,
        pytest.raises(ConfigError, match=r"own.py:make cannot be made in a worker process: .* changed since"),
    ):
        checker.check([(PROBLEM, "1")])


@pytest.mark.parametrize(("timeout", "workers"), [(0, 1), (1, 0)])
def test_numbers_that_cannot_be(timeout: float, workers: int) -> None:
    with pytest.raises(ConfigError, match=r"got 0, needs"):
        Checker(QuestionsAndAnswers(ProblemOptions()), timeout, workers)
