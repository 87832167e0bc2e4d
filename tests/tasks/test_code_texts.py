"""Where a program is in a text: fences, labels, marks of other formats, and characters that are no code."""

from __future__ import annotations

from typing import Any

import pytest

from quietstar.config.loops import ProblemOptions
from quietstar.tasks import load_task

F = "def f(x):\n    return x + 1"
G = "def f(x):\n    return g(x)"
H = "def g(x):\n    return x + 1"


def block(program: str, label: str = "python", behind: str = "") -> str:
    return f"```{label}\n{program}\n```{behind}"


TOKENS = ["</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>", "\n</s>\n"]
TOKENS += ["<|endoftext|>\nmore text (", "</s>\ndef f(x): return 0"]
LABELS = ["cpython", "text", "Plaintext", "code", "tool_code", "pyi", '"python"', "'py'", "text/x-python", "PYTHON"]
LABELS += [
    "python-repl",
    "python_code",
    "ipython3",
    "micropython",
    "Python (3.11)",
    ".python",
    "#python",
    "txt",
    "none",
]
LABELS += ["source-python", "{.py}", "py:f.py"]
BEFORE = ["\ufeff", "\u200b", "Code:", "**Code** ", "Here: ", "<s>", "Answer:\n", "### Solution ", "1) ", "\xa0", "* "]
BEFORE += ["<|im_start|>assistant\n"]
TEXTS = [
    *(block(F, behind=token) for token in TOKENS),
    *(F + token for token in TOKENS),
    *(block(F, behind=behind) for behind in (".", " That doubles.", "  ", "\n\nIt is good.", "python", "`", ":")),
    *(before + block(F) for before in BEFORE),
    *(block(F, label) for label in LABELS),
    block(">>> def f(x):\n...     return x + 1\n...\n>>> f(1)\n2", "pycon"),
    ">>> def f(x):\n...     return x + 1\n>>> f(1)\n2",
    "> ```python\n> def f(x):\n>     return x + 1\n> ```",
    "As said:\n> ```\n> def f(x):\n>\n>     return x + 1\n> ```\n",
    f"[PYTHON]\n{F}\n[/PYTHON]",
    f"Here\n[BEGIN]\n{F}\n[DONE]\n\nYou are",
    f"<code>\n{F}\n</code>",
    f'<pre><code class="language-python">\n{F}\n</code></pre>',
    "The code:\nN = 1\ndef f(x):\n    return x + N",
    "Sure, this is it:\nN: int = 1\n\ndef f(x):\n    return x + N\n\nIt adds.",
    "Answer:\nf = lambda x: x + 1\nDone here.",
    f"{block('{}', 'json')}\n\n{F}",
    f"{block('ls', 'bash')}\n{F}\nDone.",
    f"{block('1', 'text')}\n{F}",
    f"{block('pip install x', '')}\n{block(F, '')}",
    f"{block('pip install x')}\n{block(F)}",
    f"{block('print(f(1))')}\n{block(F)}",
    f"{block('import math')}\nand\n{block(F.replace('x + 1', 'math.floor(x) + 1'))}",
    f"{block(G)}\nand\n{block(H)}",
    f"{block(H)}\nand\n{block(G)}",
    f"{block('ONE = 1')}\nand\n{block(F.replace('1', 'ONE'))}",
    f"{block(F)}\nThen:\n{block(F.replace('x + 1', '0'))}",
    f"{block(F)}\nOutput:\n{block('2', '')}",
    F.replace(" ", "\xa0"),
    block(F.replace("    ", "\xa0\xa0\xa0\xa0")),
    "\ufeff" + F,
    F + "\u200b",
    # what looks like a mark, and is the program's
    block('def f(x):\n    return x + 1 + len("</s>".replace("</s>", ""))'),
    'def f(x):\n    return x + len("<|endoftext|>") - 12',
    'def f(x):\n    """Removes <s>.\n    <|endoftext|>\n    """\n    return x + 1',
    'def f(x):\n    """\n    >>> f(1)\n    2\n    """\n    return x + 1',
    'def f(x):\n    return x + {"\xa0": 1}["\xa0"]',
    f"Use ```x``` and:\n{block(F)}",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_right_program_is_found_whatever_is_around_it(text: str) -> None:
    """A token behind the fence, an odd label or `>` before each line were part of the program, or hid it."""
    program = load_task("code", ProblemOptions(path=".")).extract(text)
    assert program is not None
    space: dict[str, Any] = {}
    exec(compile(program, "solution.py", "exec", dont_inherit=True), space)
    assert [space["f"](1), space["f"](5)] == [2, 6]


@pytest.mark.parametrize("text", [block("ls", "bash"), block("x = 1;", "javascript"), block("", "python"), " \n"])
def test_a_text_without_a_program_has_none(text: str) -> None:
    assert load_task("code", ProblemOptions(path=".")).extract(text) is None
