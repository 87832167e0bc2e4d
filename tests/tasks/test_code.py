"""Programs that are right if they pass tests, and what they cannot do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from quietstar.config.loops import ProblemOptions
from quietstar.errors import DataError
from quietstar.tasks import load_task
from quietstar.tasks.code import run_tests

TEST = "assert f(1) == 2"


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("def f(x):\n    return x + 1\nprint('noise')", None),
        ("def f(x):\n    return x", "AssertionError"),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("import os\nos._exit(0)", "exited with status 0 before its tests were over"),
        ("import ctypes\nctypes.string_at(0)", "was ended by SIGSEGV before its tests were over"),
        ("x = 'a' * 2**40", "MemoryError"),
        ("open('big', 'w').write('x' * 2**22)", "File too large"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 1))", "socket.* is not allowed here"),
        ("import os\nos.fork()", "os.fork is not allowed here"),
        ("def f(", "SyntaxError"),
    ],
)
def test_programs_pass_or_fail_with_a_reason(code: str, failure: str | None) -> None:
    run = run_tests(code, TEST, timeout=20)
    assert run.passed is (failure is None)
    if failure is not None:
        assert run.failure is not None
        first, _, last = failure.partition("*")
        assert first in run.failure and last in run.failure


def test_a_program_that_hangs_is_stopped() -> None:
    assert run_tests("while True: pass", TEST, timeout=0.5).failure == "took more than 0.5 s"


def test_a_program_finds_an_empty_directory_and_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    code = "import os\nassert os.listdir() == [] and 'SECRET' not in os.environ\nopen('mine', 'w').close()\nf = len"
    before = os.listdir()
    assert run_tests(code, "assert f([]) == 0").passed
    assert os.listdir() == before


def test_problems_in_the_format_of_mbpp_and_of_humaneval(tmp_path: Path) -> None:
    rows = [
        {"task_id": 11, "text": "Write f.", "code": "f = lambda x: x + 1", "test_list": [TEST, "assert f(2) == 3"]},
        {
            "task_id": "H/0",
            "prompt": "def g(x): ...",
            "entry_point": "g",
            "test": "def check(g):\n    assert g(1) == 1",
        },
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = load_task("code", ProblemOptions(path=str(tmp_path)))
    first, second = task.problems("train")
    assert task.prompt(first) == f'"""\nWrite f.\n{TEST}\n"""\n'
    assert task.prompt(first, hint=True) == f'"""\nWrite f.\n{TEST}\nassert f(2) == 3\n"""\n'
    assert task.check(first, "Here:\n```python\nf = lambda x: x + 1\n```\nDone.").correct
    assert task.check(second, "def g(x):\n    return x").correct
    assert not task.check(first, "f = lambda x: 2").correct
    assert task.check(first, " \n").answer is None


def test_tests_that_are_no_python_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "Write f.", "test_list": ["assert f("]}))
    with pytest.raises(DataError, match=r"train\.jsonl:1: the tests are not valid Python: .* needs lines such as"):
        load_task("code", ProblemOptions(path=str(tmp_path))).problems("train")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("def f():\n    return 1", "\n\nThat is all, def is a word."),
        ("```python\ndef f():\n    return 1\n```", "\n\nQ: another?\n```python\nx = 1\n```"),
        ("Sure:\n~~~py\ndef f():\n    return 1\n~~~", "\nIt returns 1."),
        ("class A:\n    pass\n\n\ndef f():\n    return A()", "\n\n\nWrite a function that adds."),
        ("def f():\n    return 1", "\n```\n"),
    ],
)
def test_what_runs_on_is_not_trained_on(before: str, after: str) -> None:
    """No stop string ends a program, so that a base model writes on behind it."""
    task = load_task("code", ProblemOptions(path="."))
    accepted = task.accepted(before + after)
    assert accepted.removesuffix("\n```") == before.removesuffix("\n```")
    assert task.extract(accepted) == task.extract(before + after)


@pytest.mark.parametrize("behind", [" \ufeff", " \u200b", "\n\ufeff", " </s>", "\t<|endoftext|> more"])
def test_nothing_invisible_is_left_behind_a_program(behind: str) -> None:
    """The fuzz run found a program that was not the one of its own accepted text."""
    task = load_task("code", ProblemOptions(path="."))
    assert task.extract(task.accepted("```,0\n0")) == task.extract("```,0\n0")
    program = task.extract(f"x = 1{behind}")
    assert program == "x = 1" == task.extract(task.accepted(f"x = 1{behind}"))
