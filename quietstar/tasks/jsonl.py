"""Questions with answers from any JSONL files."""

from __future__ import annotations

import re

from quietstar.errors import DataError
from quietstar.tasks.expressions import same_expression
from quietstar.tasks.file_task import FileTask, Record, begins_with_hint, first_after_marker, speaks_of_hint
from quietstar.tasks.gsm8k import MARKER, equations, through_marker
from quietstar.tasks.numbers import canonical_number, plain_text
from quietstar.tasks.task import Problem, Verdict

_ANSWER_LINE = re.compile(r"^[ \t]*Answer:[ \t]*(\S.*)$", re.IGNORECASE | re.MULTILINE)
_EXPRESSION = re.compile(r"[\d\\^=+*/]")


class QuestionsAndAnswers(FileTask):
    """`Q: ...\\nA:`, answered by a rationale and `#### answer`.

    Answers are compared as numbers where both are numbers, else as texts without regard to case, white space and a dot
    at the end. Where both look like expressions, sympy decides whether they are equal.

    Args:
        options: Options of the problems. `question`, `answer`, `rationale` and `id` name the fields. `path` is a file,
            or a directory with `train.jsonl` and `test.jsonl`.
    """

    name = "jsonl"
    stop = ("\nQ:",)
    train_files = ("train.jsonl",)
    test_files = ("test.jsonl",)

    def warm_up(self) -> None:
        same_expression("1", "1")

    def read(self, record: Record, number: int) -> Problem:
        options = self.options
        question = record.text(options.question, option="problems.question")
        gold = record.text(options.answer, option="problems.answer", number=True)
        rationale = record.text(options.rationale, option="problems.rationale") if options.rationale else None
        name = record.text(options.id, option="problems.id", number=True) if options.id else str(number)
        answer = self.extract(gold) or self.canonical(gold)
        if not answer or (self.extract(gold) is None and "\n" in gold.strip()):
            raise DataError(
                f"{record.place}: field {options.answer!r} has several lines, none of which gives the final answer; "
                f"needs the answer alone, or a line '{MARKER} answer'"
            )
        return Problem(name, question, answer, rationale, place=record.place)

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        return f"Q: {problem.question}{f' ({problem.answer})' if hint else ''}\nA:"

    def extract(self, completion: str) -> str | None:
        """Returns the text after the first `####`, or else after the first `Answer:` that begins a line.

        Text after that line is ignored.
        """
        found = first_after_marker(completion, MARKER)
        if found is None and (line := _ANSWER_LINE.search(completion)):
            found = line[1]
        return None if found is None else self.canonical(found)

    def canonical(self, answer: str) -> str:
        return canonical_number(answer, symbols=False) or plain_text(answer, symbols=False)

    def check(self, problem: Problem, completion: str) -> Verdict:
        answer, gold = self.extract(completion), problem.answer
        if answer is None or answer == gold:
            return Verdict(answer, answer == gold)
        if not (_EXPRESSION.search(answer) and _EXPRESSION.search(gold)):
            return Verdict(answer, False)
        numbers = [canonical_number(text, symbols=False) for text in (gold, answer)]
        if numbers == [None, None]:
            same = same_expression(gold, answer)
        else:  # a symbol before one of two numbers, as in `x = 5 apples`, does not count
            number = canonical_number(gold)
            same = (number is not None and number == canonical_number(answer)) or same_expression(gold, answer)
        return Verdict(gold if same else answer, same)

    def accepted(self, completion: str) -> str:
        if first_after_marker(completion, MARKER) is None and (line := _ANSWER_LINE.search(completion)):
            return completion[: line.end()].rstrip()
        return through_marker(completion, MARKER)

    def solution(self, problem: Problem) -> str | None:
        if problem.rationale is None:
            return None
        if self.extract(problem.rationale) is not None:
            return f" {problem.rationale}"
        return f" {problem.rationale.rstrip()}\n{MARKER} {problem.answer}"

    def solution_key(self, completion: str) -> str:
        return equations(completion) or super().solution_key(completion)

    def quotes_hint(self, problem: Problem, completion: str) -> bool:
        return speaks_of_hint(completion) or begins_with_hint(completion, problem.answer)
