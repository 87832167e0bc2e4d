"""Grade-school word problems (GSM8K, arXiv 2110.14168), in the prompt format of STaR."""

from __future__ import annotations

import re
from collections.abc import Iterator

from quietstar.errors import DataError
from quietstar.tasks.file_task import (
    FileTask,
    PublicHome,
    Record,
    begins_with_hint,
    first_after_marker,
    speaks_of_hint,
)
from quietstar.tasks.numbers import canonical_number
from quietstar.tasks.task import Problem

MARKER = "####"
_ANNOTATION = re.compile(r"<<([^<>]*)>>")
_TOKEN = re.compile(
    r"(?P<number>\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)|(?P<operator>[-+*/()\u00d7\u00f7]|(?<!\w)x(?!\w))|(?P<equals>=)|(?P<other>[^\s$%])"
)
_OPERATORS = str.maketrans("x\u00d7\u00f7", "**/")


class GSM8K(FileTask):
    """`Q: ...\\nA:`, answered by a rationale and `#### number`.

    The calculator annotations (`<<48/2=24>>`) of the human-written solutions are kept. The hint is the final number
    alone, ` (72)` after the question; the released code of STaR showed the whole solution. The solved examples are the
    six that STaR published, unless the options name others.

    Args:
        options: Options of the problems. `path` is a directory with `train.jsonl` and `test.jsonl`, or a file.
    """

    name = "gsm8k"
    stop = ("\nQ:",)
    isolated = False
    train_files = ("train.jsonl",)
    test_files = ("test.jsonl",)
    published_examples = "gsm8k"
    home = PublicHome(
        "openai/gsm8k",
        "main/train-*.parquet",
        "main/test-*.parquet",
        "https://github.com/openai/grade-school-math/tree/master/grade_school_math/data",
        "train.jsonl and test.jsonl",
    )

    def read(self, record: Record, number: int) -> Problem:
        question, solution = record.text("question"), record.text("answer")
        answer = self.extract(solution)
        if answer is None:
            raise DataError(f"{record.place}: field 'answer' has no number to read, needs a line '{MARKER} 72'")
        return Problem(str(number), question, answer, solution, place=record.place)

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        return f"Q: {problem.question}{f' ({problem.answer})' if hint else ''}\nA:"

    def extract(self, completion: str) -> str | None:
        """Returns the number after the first `####`; text after its line is ignored."""
        found = first_after_marker(completion, MARKER)
        return None if found is None else canonical_number(found)

    def canonical(self, answer: str) -> str:
        return canonical_number(answer) or answer.strip()

    def accepted(self, completion: str) -> str:
        return through_marker(completion, MARKER)

    def solution(self, problem: Problem) -> str | None:
        return None if problem.rationale is None else f" {problem.rationale}"

    def solution_key(self, completion: str) -> str:
        """Returns the equations of a completion in their order, as RFT compares solutions (arXiv 2308.01825, section
        3.3).
        """
        return equations(completion) or super().solution_key(completion)

    def quotes_hint(self, problem: Problem, completion: str) -> bool:
        return speaks_of_hint(completion) or begins_with_hint(completion, problem.answer)


def through_marker(completion: str, marker: str) -> str:
    """Returns a completion up to the end of the line with its first `marker`; all of it where no answer follows the
    marker.
    """
    if first_after_marker(completion, marker) is None:
        return completion.rstrip()
    before, _, after = completion.partition(marker)
    return (before + marker + after.partition("\n")[0]).rstrip()


def equations(completion: str) -> str:
    """Returns the calculations of a solution: the annotated ones (`<<48/2=24>>`), or else those in its text.

    Returns:
        The calculations, joined with `;`, without white space and with canonical numbers; empty where there are none.
    """
    found = _ANNOTATION.findall(completion) or list(_written_out(completion.partition(MARKER)[0]))
    return ";".join(_plain(equation) for equation in found)


def _written_out(text: str) -> Iterator[str]:
    """Yields the calculations in a text, such as `48 / 2 = 24`, in one pass: a single regular expression would
    backtrack.
    """
    seen: list[str] = []
    numbers, complete, last = 0, False, ""
    for token in _TOKEN.finditer(text):
        kind, word = str(token.lastgroup), token[0]
        if complete and kind == "number":
            yield "".join([*seen, word])
        if kind == "other" or (complete and word != "-") or (kind == "equals" and numbers < 2):
            seen, numbers, complete, last = [], 0, False, ""
            continue
        if kind == last == "number":
            seen, numbers = [], 0
        seen.append(word)
        numbers += kind == "number"
        complete, last = complete or kind == "equals", kind


def _plain(equation: str) -> str:
    text = re.sub(r"[\s,$]", "", equation).translate(_OPERATORS).strip(".")
    return re.sub(r"\d*\.?\d+", lambda number: canonical_number(number[0]) or number[0], text)
