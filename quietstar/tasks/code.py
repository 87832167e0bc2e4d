"""Problems answered with Python code; an answer is right if it passes the problem's tests."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from quietstar.errors import DataError
from quietstar.tasks.file_task import FileTask, Record
from quietstar.tasks.task import Problem, Verdict

RUNNER = Path(__file__).with_name("code_runner.py")
_QUESTIONS = ("text", "prompt")
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class TestRun:
    """The outcome of running a program and its tests.

    Args:
        passed: Whether all tests were run and passed.
        failure: Reason for not passing, such as `AssertionError: ...`.
    """

    passed: bool
    failure: str | None = None


def run_tests(code: str, tests: str, timeout: float = 5.0, memory: int = 2**30) -> TestRun:
    """Runs a program and then its tests in a separate process, and returns the outcome.

    The process begins in an empty directory, which is removed afterwards, without the environment variables, site
    packages or open files of this process. It is limited in time, memory, the size of each file (one mebibyte) and open
    files (32). It cannot start processes or use the network through Python: an audit hook refuses both, and where the
    kernel allows it the process is also in a network without interfaces. A program that hangs, exits early or kills
    itself has failed.

    This keeps honest mistakes of a language model from doing harm. It is not a sandbox against malice: the program runs
    as the same user and can read that user's files. For code that you would not run yourself, use a container.

    Args:
        code: Python source of the program.
        tests: Python source that raises if the code is wrong, such as lines with `assert`.
        timeout: Time limit in seconds for the program and its tests together.
        memory: Limit of the address space in bytes.
    """
    token = secrets.token_hex(16)  # only known where the tests have run to their end
    request = {"code": code, "tests": tests, "timeout": timeout, "memory": memory, "token": token}
    with tempfile.TemporaryDirectory(prefix="quietstar-code-", ignore_cleanup_errors=True) as directory:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(RUNNER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env={"HOME": directory, "TMPDIR": directory, "PATH": os.defpath},
            start_new_session=True,
        )
        try:
            reply, _ = process.communicate(json.dumps(request).encode(), timeout)
        except subprocess.TimeoutExpired:
            return TestRun(False, f"took more than {timeout:g} s")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()
    return _outcome(reply, process.returncode, token)


def _outcome(reply: bytes, status: int, token: str) -> TestRun:
    try:
        told = json.loads(reply)
        if told.get("token") == token:
            return TestRun(True)
        return TestRun(False, str(told["failure"]))
    except (ValueError, KeyError, AttributeError):
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        return TestRun(False, f"{how} before its tests were over")


class CodeProblems(FileTask):
    '''Programs that pass tests, as in MBPP (arXiv 2108.07732) and, in the same format, HumanEval.

    The prompt is the question and the first test between `"""`. The answer of a problem is its tests, so that the hint
    shows all of them. The answer of a completion is its code: the first block between backticks, or else the whole
    text.

    Args:
        options: Options of the problems. `path` is a JSONL file, or a directory with `train.jsonl` and `test.jsonl`.
            The question is in the field that `question` names, in `text` or in `prompt`. The tests are a list
            `test_list`, or Python source in `tests` or `test`; where the record has the field `entry_point`, the tests'
            function `check` is called with it. The id is `task_id`, or else the position among the problems of the
            split.
    '''

    name = "code"
    stop = ("\nassert", '\n"""', "\nclass ", "\nprint(", "\nif ")
    train_files = ("train.jsonl",)
    test_files = ("test.jsonl",)

    def read(self, record: Record, number: int) -> Problem:
        fields = record.fields
        field = next((name for name in (self.options.question, *_QUESTIONS) if name in fields), self.options.question)
        solution = next((record.text(name) for name in ("code", "canonical_solution") if name in fields), None)
        name = record.text("task_id", number=True) if "task_id" in fields else str(number)
        return Problem(name, record.text(field).strip(), _tests(record), solution, place=record.place)

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        tests = problem.answer if hint else problem.answer.partition("\n")[0]
        return f'"""\n{problem.question}\n{tests}\n"""\n'

    def extract(self, completion: str) -> str | None:
        block = _BLOCK.search(completion)
        code = (completion if block is None else block[1]).rstrip()
        return code if code.strip() else None

    def check(self, problem: Problem, completion: str) -> Verdict:
        """Runs the tests, with a slightly shorter time limit than a worker process gets for the whole check."""
        code = self.extract(completion)
        passed = code is not None and run_tests(code, problem.answer, 0.8 * self.options.timeout).passed
        return Verdict(code, passed)


def _tests(record: Record) -> str:
    tests = record.fields.get("test_list")
    if isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
        setup = record.fields.get("test_setup_code") or "\n".join(record.fields.get("test_imports") or [])
        source = "\n".join([*([setup] if setup else []), *tests])
    else:
        source = record.text("tests" if "tests" in record.fields else "test")
        if "entry_point" in record.fields:
            source += f"\ncheck({record.text('entry_point')})"
    try:
        compile(source, record.place, "exec")
    except (SyntaxError, ValueError) as error:
        raise DataError(
            f"{record.place}: the tests are not valid Python: {error}; needs lines such as `assert f(1) == 2`"
        ) from None
    return source.strip("\n")
