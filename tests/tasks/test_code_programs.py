"""Right programs in the shapes that people and models write: where they are in a text, and what their tests ask."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quietstar.config.loops import ProblemOptions
from quietstar.errors import DataError
from quietstar.tasks import load_task
from quietstar.tasks.code import run_tests

F = "def f(x):\n    return x + 1"


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        (f"~~~~ PY\n{F}\n~~~~", F),
        (f"```python3.11\n{F}\n```", F),
        (f'```python title="f.py"\n{F}\n```', F),
        (f"```{{.python .numberLines}}\n{F}\n```", F),
        (f"```json\n{{}}\n```\n```\n{F}\n```", F),
        (f"```\nno\n```\n```python\n{F}\n```", F),
        (f"````python\n{F}\n```\n````", f"{F}\n```"),
        (f"```python\n{F}\n", F),
        (f"```python\n{F}\n~~~\n", f"{F}\n~~~"),
        ("1. So:\n   ```py\n   def f(x):\n       return x + 1\n   ```", F),
        ("- ```py\n  def f(x):\n      return x + 1\n  ```", F),
        (f'```python\n"""\n```\nf(1)\n```\n"""\n{F}\n```\nDone.', f'"""\n```\nf(1)\n```\n"""\n{F}'),
        (f"```python\n{F}\n```\n```python\nf = 1\n```", F),
        (f"{F}\n```\nThis adds one.", F),
        (f"{F}\n\nassert f(1) == 3\nprint(f(1))\n", F),
        (f"{F}\n\nThis adds one.\n", F),
        (f"Here it is:\n{F}", F),
        (f"{F}\n\ndef g(", F),
        ("    def f(x):\n        return x + 1", F),
        (f"{F}\n\nclass A:\n    pass", f"{F}\n\nclass A:\n    pass"),
        ("```bash\nls\n```", None),
        ("  \n", None),
    ],
)
def test_a_program_is_found_in_a_text(completion: str, program: str | None) -> None:
    for text in (completion, completion.replace("\n", "\r\n")):
        assert load_task("code", ProblemOptions(path=".")).extract(text) == program


STACK = """
class Stack:
    def __init__(self, *items): self.items = list(items)
    def push(self, x): self.items.append(x); return self
    def pop(self):
        if not self.items: raise Empty("empty")
        return self.items.pop()
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, at): return self.items[at]
    def __eq__(self, other): return self.items == other.items
    def __repr__(self): return f"Stack{tuple(self.items)}"
class Empty(LookupError): pass
"""


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        ("def sum(a, b): return a + b", "assert sum(1, 2) == 3"),
        ("import math\ndef f(x): return x ** 0.5", "assert math.isclose(f(2), 1.41421356, rel_tol=1e-6)"),
        ("def f(x): x.sort(); return x", "a = [3, 1, [2]][:2]\nassert f(a) is a and a == [1, 3]"),
        ("def f(d): d['k'].append(d)", "d = {'k': []}\nf(d)\nassert d['k'][0] is d"),
        ("def f(x): return float('nan') if x else float('-inf')", "assert f(1) != f(1) and f(0) == -float('inf')"),
        ("def f(n): return 3 ** n", "assert f(20_000) == 3 ** 20_000 and type(f(0)) is int"),
        ("def f(n):\n    for i in range(n): yield i", "assert list(f(3)) == [0, 1, 2] and next(f(1)) == 0"),
        (
            "def f(g, x): return [g(i) for i in x]",
            "assert f(lambda i: i * 2, (1, 2)) == [2, 4] and f(str, [1]) == ['1']",
        ),
        (
            "def f(x): raise KeyError(x)",
            "try:\n    f(1)\nexcept KeyError as e:\n    assert e.args == (1,)\nelse:\n    assert 0",
        ),
        ("from collections import *\ndef f(x): return Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}"),
        (
            "from collections import *\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)",
            "assert f() == (1, 2) and f().x == 1",
        ),
        (
            "def f(x): return {1: (None, b'z', {2}, frozenset(), 1j, 'é\\ud800')}",
            "assert f(0) == {1: (None, b'z', {2}, frozenset(), 1j, 'é\\ud800')}",
        ),
        (
            STACK,
            "s = Stack(1)\nassert s.push(5) == Stack(1, 5) and len(s) == 2 and s[0] == 1 and repr(s) == 'Stack(1, 5)'\n"
            "assert s.pop() == 5 and list(s) == [1] and isinstance(s, Stack) and 1 in s",
        ),
        (
            STACK,
            "try:\n    Stack().pop()\nexcept Empty as e:\n    assert str(e) == 'empty' and isinstance(e, LookupError)\n"
            "else:\n    assert False",
        ),
        (
            "class L(list):\n    def first(self): return self[0]\ndef f(): return L([1, 2])",
            "assert f() == [1, 2] and f().first() == 1",
        ),
        ("n = 0\ndef f():\n    global n\n    n += 1\n    return n", "assert [f(), f()] == [1, 2]"),
        ("from fractions import Fraction as f", "assert f(1, 2) + f(1, 3) == f(5, 6)"),
        ("def f(x): return max(x)", "def check(candidate):\n    assert candidate([1, 2]) == 2\ncheck(f)"),
        ("open('mine', 'w').write('x')\ndef f(): return open('mine').read()", "assert f() == 'x'"),
        ("def f(*a, k=0, **n): return a, k, n", "assert f(1, k=2, z=3) == ((1,), 2, {'z': 3})"),
        (
            "import re, heapq, json, bisect, itertools\ndef f(x): return json.loads(x)",
            "assert f('[1.5, true]') == [1.5, True]",
        ),
    ],
)
def test_a_right_program_passes(code: str, tests: str) -> None:
    run = run_tests(code, tests, timeout=20)
    assert run.passed, run.failure


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        ("FileNotFoundError(2, 'gone', 'a')", "FileNotFoundError"),
        ("OSError(13, 'no')", "PermissionError"),
        ("OSError('no')", "OSError"),
        ("UnicodeDecodeError('utf-8', b'x', 0, 1, 'why')", "ValueError"),
        ("KeyError('k')", "LookupError"),
        ("ExceptionGroup('g', [ValueError(1)])", "Exception"),
        ("Own(1, 2)", "Own"),
        ("OwnFile('a')", "OSError"),
        ("SyntaxError('bad', ('f', 1, 2, 'x'))", "SyntaxError"),
        ("ImportError('no', name='m')", "ImportError"),
    ],
)
def test_an_error_of_a_program_is_that_error_in_its_tests(error: str, wanted: str) -> None:
    """Errors of the operating system were a TypeError there."""
    code = "class Own(Exception):\n    def __init__(self, a, b): super().__init__(a + b)\n"
    code += f"class OwnFile(FileNotFoundError): pass\ndef f(): raise {error}"
    tests = f"try:\n    f()\nexcept {wanted} as e:\n    text = str(e)\nelse:\n    assert False\n"
    space: dict[str, type[Exception]] = {}
    exec(code, space)
    try:
        space["f"]()
    except Exception as raised:
        tests += f"assert text.partition(': ')[0] == {str(raised).partition(': ')[0]!r}, text"
    run = run_tests(code, tests, timeout=20)
    assert run.passed, run.failure


@pytest.mark.parametrize("test", ["assert " + "(" * 300 + "1" + ")" * 300, "x = " + "-" * 100_000 + "1", "f(1)\0"])
def test_tests_that_the_compiler_cannot_read_are_refused_with_their_place(test: str, tmp_path: Path) -> None:
    """A test too deep for the compiler once ended a run in a traceback."""
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "Write f.", "test_list": [test]}))
    with pytest.raises(DataError, match=r"train\.jsonl:1: the tests are not valid Python: .+; needs lines such as"):
        load_task("code", ProblemOptions(path=str(tmp_path))).problems("train")
