"""Competition problems (MATH, arXiv 2103.03874) with a number as answer."""

from __future__ import annotations

import re
from collections.abc import Iterable

from quietstar.errors import DataError
from quietstar.tasks.expressions import same_expression
from quietstar.tasks.file_task import (
    FileTask,
    PublicHome,
    Record,
    begins_with_hint,
    first_after_marker,
    last_box,
    speaks_of_hint,
    through_box,
)
from quietstar.tasks.gsm8k import MARKER, equations, through_marker
from quietstar.tasks.numbers import canonical_latex, latex_number
from quietstar.tasks.task import Problem, Verdict

_QUESTIONS = ("problem", "question", "input")
_SOLUTIONS = ("solution", "output", "answer")
_TRANSFER = ("Algebra", "Counting & Probability", "Prealgebra", "Number Theory")


class MathNumeric(FileTask):
    r"""`Q: ...\nA:`, answered by a solution that ends in `\boxed{...}`, or in `#### number` as in GSM8K.

    Models trained on GSM8K can therefore be asked without change, which is how V-STaR measures transfer. Problems with
    an answer that is not a number are left out and counted in `left_out`. Groups are `subject, level`.

    Args:
        options: Options of the problems. `path` is a directory with `train.jsonl` and `test.jsonl`, or with folders
            `train*` and `test*` of files; or a file. Problems have the fields `problem` (or `question`, `input`) and
            `solution` (or `output`, `answer`).
    """

    name = "math"
    stop = ("\nQ:",)
    train_files = ("train.jsonl", "train*/**/*.json*")
    test_files = ("test.jsonl", "test*/**/*.json*")
    home = PublicHome(
        "EleutherAI/hendrycks_math",
        "*/train-*.parquet",
        "*/test-*.parquet",
        "https://github.com/hendrycks/math",
        "the folders train and test",
    )

    def warm_up(self) -> None:
        same_expression("1", "1")

    def read(self, record: Record, number: int) -> Problem | None:
        question = record.text(_present(record, _QUESTIONS))
        field = _present(record, _SOLUTIONS)
        solution = record.text(field)
        box = last_box(solution)
        if box is None:
            raise DataError(f"{record.place}: field {field!r} has no answer to read, needs one in \\boxed{{...}}")
        answer = latex_number(box)
        if answer is None:
            return None
        name = record.text("unique_id") if "unique_id" in record.fields else str(number)
        return Problem(name, question, answer, solution, _group(record), record.place)

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        return f"Q: {problem.question}{f' ({problem.answer})' if hint else ''}\nA:"

    def extract(self, completion: str) -> str | None:
        r"""Returns the content of the `\boxed{...}` that counts, or the text after the first `####` where that comes
        first.

        The last box counts, as in MATH's own evaluation, but only within the first paragraph that has one: text after
        the answer is ignored. (This gives another answer for 3 of the 8,286 human-written solutions.)
        """
        text = self.accepted(completion)
        found = last_box(text) or first_after_marker(text, MARKER)
        return canonical_latex(found) if found else None

    def canonical(self, answer: str) -> str:
        return canonical_latex(answer)

    def check(self, problem: Problem, completion: str) -> Verdict:
        """Compares numbers exactly; whether another expression equals the number is decided by sympy."""
        answer = self.extract(completion)
        if answer is None or latex_number(answer) is not None:
            return Verdict(answer, answer == problem.answer)
        same = same_expression(problem.answer, answer)
        return Verdict(problem.answer if same else answer, same)

    def accepted(self, completion: str) -> str:
        """Returns a completion up to the line of its answer, and the line that closes the formula around the answer."""
        return min(through_marker(completion, MARKER), through_box(completion).rstrip(), key=len)

    def solution(self, problem: Problem) -> str | None:
        return None if problem.rationale is None else f" {problem.rationale}"

    def solution_key(self, completion: str) -> str:
        return equations(completion) or super().solution_key(completion)

    def quotes_hint(self, problem: Problem, completion: str) -> bool:
        return speaks_of_hint(completion) or begins_with_hint(completion, problem.answer)


def transfer_problems(problems: Iterable[Problem]) -> list[Problem]:
    """Returns the problems of MATH's test split that V-STaR measures transfer on (arXiv 2402.06457, section 4).

    They are of level 1 and four subjects, with a number as answer and no LaTeX in the question. The paper has 150 and
    does not say which; counting every backslash as LaTeX gives 158.
    """
    groups = {f"{subject}, Level 1" for subject in _TRANSFER}
    return [problem for problem in problems if problem.group in groups and "\\" not in problem.question]


def _present(record: Record, names: tuple[str, ...]) -> str:
    return next((name for name in names if name in record.fields), names[0])


def _group(record: Record) -> str:
    """Returns subject and level, where they are known."""
    subject = next((record.text(name) for name in ("type", "subject") if name in record.fields), "")
    level = str(record.fields.get("level", ""))
    return ", ".join(filter(None, (subject, re.sub(r"^(?=\d)", "Level ", level))))
