"""Problems answered with Python code; an answer is right if it passes the problem's tests."""

from __future__ import annotations

import ast
import builtins
import json
import os
import platform
import re
import signal
import subprocess
import symtable
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from quietstar.config.parsing import parse_json
from quietstar.errors import DataError
from quietstar.runs.machine import end_session
from quietstar.tasks.code_process import system_call_filter
from quietstar.tasks.file_task import END_OF_TEXT, FileTask, Record
from quietstar.tasks.task import Problem, Verdict

RUNNER, TESTS = (Path(__file__).with_name(name) for name in ("code_runner.py", "code_tests.py"))
_QUESTIONS = ("text", "prompt")
_OPENS = re.compile(
    r"(?P<indent>[ \t]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?)(?:[^`~]*[\s:*])??(?P<fence>`{3,}(?=[^`]*$)|~{3,})(?P<info>.*)"
)
_CLOSES = re.compile(r"\s*\n[ \t]*(?:`{3,}|~{3,})")
_LANGUAGE = re.compile(r"[\s{.\"'#]*([^\s{}:;,=\"']*)")
_PYTHON = re.compile(
    r"(?:text/x-|source[-.]|language-)?(?:[ic]|micro)?py(?:thon)?[\d.]*(?:i|[-_]?(?:con(?:sole)?|repl|code|script))?",
    re.IGNORECASE,
)
_NO_LANGUAGE = ("", "code", "none", "plain", "plaintext", "text", "tool_code", "txt")
_TAGS = {
    "```python": re.compile(r"^[ \t]*(?:\[(?:PYTHON|BEGIN|CODE)\]|(?:<pre>)?<code[^>\n]*>)[ \t]*$", re.MULTILINE),
    "```": re.compile(r"^[ \t]*(?:\[(?:/PYTHON|DONE|END|/CODE)\]|</code>(?:</pre>)?)[ \t]*$", re.MULTILINE),
}
_SPACES = dict.fromkeys(map(ord, "\ufeff\u200b\u200c\u200d\u2060"), "") | dict.fromkeys(
    map(ord, "\xa0\u202f\u3000"), " "
)
_STARTS = re.compile(r"(?:def|class|import|from|async|@\w)\b|[A-Za-z_]\w*[ \t]*(?::[^=\n]+)?=(?!=)")
_STARTS_TRIED = 6
_DEFINES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
_FENCES_TRIED = 20
MOST_FILES, MOST_WRITTEN = 200, 2**24
"""How many files and bytes a program may have in its directory."""

_WATCHED_EVERY = 0.05
_NO_PROGRAM = (SyntaxError, ValueError, RecursionError, MemoryError)  # how the compiler refuses a source


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
    """Runs a program and its tests in two separate processes, and returns the outcome.

    The program's process gets its source and then calls, and answers with plain values; it has no part of the tests,
    and what it answers is compared in the tests' process. An object of the program's own classes stays with it: to the
    tests it is an object of a class of the same name, whose attributes, methods and operators ask the program. So do
    objects of the tests' classes for the program. Plain values are copied, but a function of the program can change the
    lists, dicts and sets that it is called with.

    An object of the program never decides whether it equals a plain value that was expected, so some right programs are
    refused: `V(2, 3) == (2, 3)` is False unless `V` is derived from tuple; an operator on a plain value and an object
    of the program has to make another such object, which has no length, size or truth for the tests; `in` asks the
    object only if the tests name its class; the program's context managers cannot hide an error. Refused as well:
    what needs one memory for both, such as captured output, replaced functions, a shared random state or lists that
    are kept; files, which each of the two has alone; the values of standard types that are not copied (`uuid.UUID`).
    Coroutines run one after another, in the program's process.

    Both processes begin in an empty directory of their own, which is removed afterwards, without the environment
    variables, site packages or open files of this process. Both are limited in time, memory, open files (32), the size
    of each file (one mebibyte), and of all (200 files, 16 mebibytes). The kernel keeps both from more, where it can:
    Landlock from all files but Python's and those of their directory, a filter of system calls from processes, signals,
    sockets (but pairs within the process) and, without Landlock, from writing at all. A program that hangs, exits early
    or kills itself has failed. SECURITY.md tells what this holds against.

    Args:
        code: Python source of the program.
        tests: Python source that raises if the code is wrong, such as lines with `assert`.
        timeout: Time limit in seconds for the program and its tests together.
        memory: Limit of the address space in bytes.
    """
    with _directory() as directory, _directory() as other, ExitStack() as ends:
        calls, replies = os.pipe(), os.pipe()
        pipes = (*calls, *replies)
        try:
            program = ends.enter_context(_started(RUNNER, directory, calls[0], replies[1]))
            testing = ends.enter_context(
                _started(TESTS, other, subprocess.PIPE, subprocess.PIPE, (calls[1], replies[0]))
            )
        finally:
            for number in pipes:
                os.close(number)
        names, modules = _wanted_names(tests)
        filters = [system_call_filter(platform.machine(), writes).hex() for writes in (False, True)]
        request = {
            "names": names,
            "modules": modules,
            "filters": filters,
            "code": code,
            "tests": tests,
            "timeout": timeout,
            "memory": memory,
            "pipe": (calls[1], replies[0]),
        }
        ends_at = time.monotonic() + timeout
        asked: bytes | None = json.dumps(request).encode() + b"\n"
        while True:
            left = ends_at - time.monotonic()
            try:
                reply, _ = testing.communicate(asked, min(_WATCHED_EVERY, max(0.0, left)))
                break
            except subprocess.TimeoutExpired:
                asked = None
            if left <= 0:
                return TestRun(False, f"took more than {timeout:g} s")
            if _holds_too_much(directory) or _holds_too_much(other):
                return TestRun(False, f"wrote more than {MOST_FILES} files or {MOST_WRITTEN >> 20} MiB")
        outcome = _outcome(reply)
        if outcome.get("ended"):
            with suppress(subprocess.TimeoutExpired):  # it may take a moment to be gone
                program.wait(1.0)
        status = program.poll() if outcome.get("ended") else testing.returncode
    if outcome.get("passed") is True:
        return TestRun(True)
    if "failure" in outcome:
        return TestRun(False, outcome["failure"])
    how = "closed its pipe" if status is None else f"exited with status {status}"
    if status is not None and status < 0:
        how = f"was ended by {signal.Signals(-status).name}"
    return TestRun(False, f"{how} before its tests were over")


def _outcome(reply: bytes) -> dict[str, Any]:
    """Returns what the tests' process has said; nothing where it died, or said what cannot be read."""
    try:
        value = parse_json(reply or b"{}", surrogates=True)
    except DataError:
        return {}
    return value if isinstance(value, dict) else {}


def _holds_too_much(directory: str) -> bool:
    waiting, files, written = [directory], 0, 0
    while waiting and files <= MOST_FILES and written <= MOST_WRITTEN:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    files += 1
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        written += entry.stat(follow_symlinks=False).st_blocks * 512
        except FileNotFoundError:
            continue  # it is gone
        except OSError:
            return True  # its name is too long
    return bool(waiting) or files > MOST_FILES or written > MOST_WRITTEN


@contextmanager
def _directory() -> Iterator[str]:
    """Makes an empty directory, and removes it, however deep a program has made it: `shutil.rmtree` gives up where
    Python's stack ends.
    """
    directory = tempfile.mkdtemp(prefix="quietstar-code-")
    try:
        yield directory
    finally:
        subprocess.run(["rm", "-rf", "--", directory], stderr=subprocess.DEVNULL, check=False)


@contextmanager
def _started(
    file: Path, directory: str, stdin: int, stdout: int, keep: tuple[int, ...] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """Starts one of the two processes in a session of its own, which is ended with all that is in it."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(file)],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        cwd=directory,
        env={"HOME": directory, "TMPDIR": directory, "PATH": os.defpath},
        pass_fds=keep,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        end_session(process)


@lru_cache(1024)
def _wanted_names(source: str) -> tuple[list[str], list[str]]:
    """Returns the names that the tests need from the program, and the standard modules that they use but do not import.

    A program may not replace a builtin function, unless its name is the only one that the tests use (MBPP has `sum`).
    """
    tree = _parse(source)
    if tree is None:  # the tests' process tells how it is wrong
        return [], []
    table = symtable.symtable(source, "tests.py", "exec")
    bound = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    tables, used = [table], set()
    while tables:
        one = tables.pop()
        tables += one.get_children()
        used |= {symbol.get_name() for symbol in one.get_symbols() if symbol.is_global() or one is table}
    loads = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    parents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    alone = {node.id for node in loads if id(node) not in parents}
    names, own = used - bound, set(dir(builtins))
    modules = (names - alone) & sys.stdlib_module_names
    return sorted(names if len(names) == 1 else names - own - modules), sorted(modules)


class CodeProblems(FileTask):
    '''Programs that pass tests, as in MBPP (arXiv 2108.07732) and, in the same format, HumanEval.

    The prompt is the question and the first test between `"""`. The answer of a problem is its tests, so that the hint
    shows all of them. The answer of a completion is its code: the first block that defines
    something of those in a fence that is labelled as Python, else of those without a label of a language, with the
    blocks that it needs; else the text outside of blocks up to where it is no Python any more. What follows an
    end-of-text token is no part of it. Such a text can be a base model's
    that goes on after its program, so calls of `print`, asserts and strings that stand alone behind its first
    definition are left out. Only `stop` ends a completion early, and no program needs what it stands for: a string
    alone behind two empty lines, which is how the next prompt would begin.

    Args:
        options: Options of the problems. `path` is a JSONL file, or a directory with `train.jsonl` and `test.jsonl`.
            The question is in the field that `question` names, in `text` or in `prompt`. The tests are a list
            `test_list`, or Python source in `tests` or `test`; where the record has the field `entry_point`, the tests'
            function `check` is called with it. The id is `task_id`, or else the position among the problems of the
            split.
    '''

    name = "code"
    stop = ('\n\n\n"""\n',)
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
        code = _program(completion.replace("\r\n", "\n").replace("\r", "\n"))
        return code if code.strip() else None

    def accepted(self, completion: str) -> str:
        """Returns a completion up to the end of its program, or of the fence around it; all of it where tests stand
        between its lines.
        """
        code = self.extract(completion)
        if code is None or code not in completion:
            return completion.rstrip()
        end = completion.index(code) + len(code)
        closing = _CLOSES.match(completion, end)
        cut = completion[: closing.end() if closing else end].rstrip()
        return cut if self.extract(cut) == code else completion.rstrip()  # what stands before may look like the program

    def check(self, problem: Problem, completion: str) -> Verdict:
        """Runs the tests, with a slightly shorter time limit than a worker process gets for the whole check."""
        code = self.extract(completion)
        passed = code is not None and run_tests(code, problem.answer, 0.8 * self.options.timeout).passed
        return Verdict(code, passed)


def _program(text: str) -> str:
    """Returns the program in a completion; empty if it has only blocks of other languages."""
    whole, *others = [_without_odd_spaces(_written_in(reading)) for reading in _readings(text)]
    programs = (
        [whole, *others] if END_OF_TEXT.search(whole) else [*others, whole]
    )  # a token in a string is the program's
    return next(filter(_defines, programs), whole).rstrip()


def _readings(text: str) -> Iterator[str]:
    """Yields a text as it is, then as it may have been meant: up to an end-of-text token, without the marks of a quote,
    and what was typed in an interactive session.
    """
    for fence, tag in _TAGS.items():
        text = tag.sub(fence, text)
    yield text
    text = next((part for part in END_OF_TEXT.split(text) if part.strip()), text)
    yield text
    if text.lstrip().startswith(">") or "\n>" in text:
        yield re.sub(r"^[ \t]*> ?", "", text, flags=re.MULTILINE)
        typed = re.findall(r"^[> \t]*(?:>>>|\.\.\.)(?: (.*)|$)", text, flags=re.MULTILINE)
        yield "\n".join(typed)


def _written_in(text: str) -> str:
    outside, before, blocks = _blocks(text.split("\n"))
    if not blocks:
        return _code_before_prose(before)
    labelled = [block for label, block in blocks if _PYTHON.fullmatch(label)]
    if not labelled and any(not isinstance(node, ast.Expr) for node in _statements(before)):
        return before  # the fence was opened in the prompt
    candidates = labelled or [block for label, block in blocks if label.casefold() in _NO_LANGUAGE]
    chosen = next(filter(_defines, candidates), None)
    if chosen is None:
        written = _code_before_prose(outside)
        return written if _defines(written) else next(iter(candidates), "")
    own, needed = _bound(chosen), _needed(chosen)
    return "\n\n".join(
        block
        for block in candidates
        if block is chosen
        or (
            not own & (bound := _bound(block))
            and (needed & bound or (own & _needed(block) and _defines(block, (ast.FunctionDef, ast.ClassDef))))
        )
    )


def _needed(source: str) -> set[str]:
    return {name for names in _wanted_names(source) for name in names}


def _without_odd_spaces(source: str) -> str:
    plain = source.translate(_SPACES)
    return plain if _parse(source) is None and _parse(plain) is not None else source


def _statements(source: str) -> list[ast.stmt]:
    tree = _parse(source.translate(_SPACES))
    return [] if tree is None else tree.body


def _defines(source: str, kinds: tuple[type[ast.stmt], ...] = _DEFINES) -> bool:
    return any(isinstance(node, kinds) for node in _statements(source))


def _bound(source: str) -> set[str]:
    if not _statements(source):
        return set()
    symbols = symtable.symtable(source.translate(_SPACES), "solution.py", "exec").get_symbols()
    return {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}


def _blocks(lines: list[str]) -> tuple[str, str, list[tuple[str, str]]]:
    """Returns the text outside of all fenced blocks, that before the first, and the label and content of each.

    A line that begins with a block's fence closes it, whatever stands behind the fence; but not one in a string of a
    program, if the program is whole only behind it.
    """
    blocks: list[tuple[str, str]] = []
    outside: list[str] = []
    first, at = len(lines), 0
    while at < len(lines):
        opening = _OPENS.fullmatch(lines[at].translate(_SPACES))
        at += 1
        if opening is None:
            outside.append(lines[at - 1])
            continue
        first = min(first, at - 1)
        margin = len(opening["indent"].expandtabs(4))
        label = _LANGUAGE.match(opening["info"])
        closes = re.compile(rf"{re.escape(opening['fence'])}(?P<behind>.*)")
        ends = [
            end
            for end in range(at, len(lines))
            if closes.match(lines[end].lstrip(" \t"))
            and len(lines[end].expandtabs(4)) - len(lines[end].expandtabs(4).lstrip()) <= margin + 3
        ] or [len(lines)]
        contents = (_dedented(lines[at:end], margin) for end in ends[:_FENCES_TRIED])
        end, content = next(
            ((end, content) for end, content in zip(ends, contents, strict=False) if _statements(content)),
            (ends[0], _dedented(lines[at : ends[0]], margin)),
        )
        blocks.append((label[1] if label else "", content))
        at = end + 1
    return _dedented(outside, 0), _dedented(lines[:first], 0), blocks


def _dedented(lines: list[str], margin: int) -> str:
    inner = [line[min(margin, len(line) - len(line.lstrip(" "))) :] for line in lines]
    return textwrap.dedent("\n".join(inner)).rstrip()


def _parse(source: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(source)
    except _NO_PROGRAM:
        return None


def _code_before_prose(text: str) -> str:
    """Returns the lines of a text without fences that are Python, without the tests that a model adds to its program;
    the whole text if there are none.
    """
    lines = text.strip("\n").split("\n")
    starts = [0, *(number for number, line in enumerate(lines) if _STARTS.match(line))][:_STARTS_TRIED]
    for start in starts:
        end = len(lines)
        while end > start:
            source = "\n".join(lines[start:end])
            try:
                with warnings.catch_warnings(action="ignore"):
                    tree = ast.parse(source)
            except SyntaxError as error:
                wrong = start + min(error.lineno or 1, end - start)
                # a line that is indented belongs to the statement before it
                end = max((n for n in range(start, wrong) if lines[n][:1].strip()), default=start)
            except _NO_PROGRAM:
                return text
            else:
                if start == 0 and end < len(lines) and not any(isinstance(node, _DEFINES) for node in tree.body):
                    break  # a word of prose is an expression of Python too
                return _without_tests(source, tree)
    return text


def _without_tests(source: str, tree: ast.Module) -> str:
    lines = source.split("\n")
    defined = False
    for node in tree.body:
        if defined and _is_test(node):
            assert node.end_lineno is not None
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
        defined = defined or isinstance(node, _DEFINES)
    kept = "\n".join(lines).rstrip()
    return kept if _parse(kept) is not None else source


def _is_test(node: ast.stmt) -> bool:
    match node:
        case ast.Assert() | ast.Expr(ast.Constant()) | ast.Expr(ast.Call(ast.Name("print"))):
            return True
    return False


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
    except _NO_PROGRAM as error:
        raise DataError(
            f"{record.place}: the tests are not valid Python: {str(error) or type(error).__name__}; needs "
            "lines such as `assert f(1) == 2`"
        ) from None
    return source.strip("\n")
