"""The answer formats of the paper's evaluation: how a task is asked without examples, and how its answers are
written.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from quietstar.config.loops import ProblemOptions
from quietstar.config.options import path_kind
from quietstar.tasks.commonsenseqa import first_letter
from quietstar.tasks.numbers import canonical_number, numbers_in
from quietstar.tasks.registry import load_task
from quietstar.tasks.task import Problem, Task

STEP_BY_STEP = " Let's think step by step."
NEXT_QUESTION = "\nQ:"
_IN_PARENTHESES = re.compile(r"\(([A-Ea-e])\)")
_ANSWER_LINE = re.compile(r"([A-E])\.?|\(([A-Ea-e])\)[^()]*")


@dataclass(frozen=True)
class AnswerFormat(ABC):
    """A task in the zero-shot format of the paper: `Q: ...\\nA:`, answered by ` 72` or ` C` and a line end.

    Args:
        task: Task that has the problems and judges their answers.

    Attributes:
        symbols: Regular expression of what one token of an answer may spell.
        any_symbol: Regular expression of one character of the answer's alphabet.
        conclusion: Sentence that ends a chain of thought, so that the answer comes next (arXiv 2205.11916, section
            2.2).
        finished: Regular expression of a text after which a written-out answer is complete.
        strictly: Description of where an answer is looked for in a completion, for people to read.
        leniently: Description of where `lenient` looks in addition.
        concluding: Description of where an answer is looked for after the conclusion of a chain of thought.
    """

    task: Task
    symbols: ClassVar[re.Pattern[str]]
    any_symbol: ClassVar[re.Pattern[str]]
    conclusion: ClassVar[str]
    finished: ClassVar[re.Pattern[str]]
    strictly: ClassVar[str]
    leniently: ClassVar[str]
    concluding: ClassVar[str]

    def prompt(self, problem: Problem) -> str:
        """The question up to `A:`, as the loops ask it."""
        return self.task.prompt(problem)

    @abstractmethod
    def answer(self, problem: Problem) -> str:
        """Returns the answer that follows after a space: `72`, `C`."""

    @abstractmethod
    def is_concluded(self, text: str) -> bool:
        """Returns whether the answer after the conclusion is complete, so that further text changes nothing."""

    @abstractmethod
    def _direct(self, line: str) -> str | None:
        """Returns the answer that a first line gives without a sentence around it."""

    @abstractmethod
    def _first(self, text: str) -> str | None:
        """Returns the answer that a text after the conclusion gives."""

    @abstractmethod
    def _anywhere(self, problem: Problem, text: str) -> str | None:
        """Returns the answer that a completion may mean where it has none in the expected place."""

    @abstractmethod
    def _marked(self, answer: str) -> str:
        """Returns an answer in the form that the task's own checker finds."""

    def is_complete(self, completion: str) -> bool:
        """Returns whether further text would change nothing."""
        first_line, ended, _ = completion.lstrip().partition("\n")
        return (
            NEXT_QUESTION in completion
            or self.finished.search(completion) is not None
            or (bool(ended) and self._direct(first_line) is not None)
        )

    def for_checker(self, completion: str) -> str:
        """Returns a completion in the form that the task's own checker reads; a direct answer on its first line gets a
        marker.
        """
        kept = completion.partition(NEXT_QUESTION)[0]
        direct = self._direct(kept.lstrip().partition("\n")[0])
        return kept if direct is None else self._marked(direct)

    def lenient(self, problem: Problem, completion: str) -> str:
        """Returns `for_checker`, except that an answer elsewhere counts too; empty for none."""
        strict = self.for_checker(completion)
        if self.task.extract(strict) is not None:
            return strict
        found = self._anywhere(problem, completion.partition(NEXT_QUESTION)[0])
        return "" if found is None else self._marked(found)

    def concluded(self, text: str) -> str:
        """Returns the text after the conclusion in the form that the task's own checker reads; empty for no answer."""
        found = self._first(text.partition(NEXT_QUESTION)[0])
        return "" if found is None else self._marked(found)

    def chain(self, text: str) -> str:
        """Returns a chain of thought up to its own conclusion in the same words, or up to another question."""
        return text.partition(NEXT_QUESTION)[0].partition(self.conclusion)[0].rstrip()

    def is_chain_complete(self, text: str) -> bool:
        """Returns whether `chain` would leave out any further text."""
        return NEXT_QUESTION in text or self.conclusion in text


class NumberFormat(AnswerFormat):
    """The format of GSM8K: an answer is a number."""

    symbols = re.compile(r"[0-9]+")
    any_symbol = re.compile(r"[0-9]")
    conclusion = "\nTherefore, the answer (arabic numerals) is"
    finished = re.compile(r"^(?>[^\n]*?####)[^\S\n]*+\S[^\n]*+\n", re.MULTILINE)
    strictly = "a first line that is one number and nothing else but its unit, or the number after the first ####"
    leniently = "the last number, if it can be read whole"
    concluding = "the first number after the sentence that asks for it, if it can be read whole"

    def answer(self, problem: Problem) -> str:
        return problem.answer

    def is_concluded(self, text: str) -> bool:
        """Returns whether no further text can change the first number, as `million` would."""
        return NEXT_QUESTION in text or next(numbers_in(text), (None, False))[1]

    def _direct(self, line: str) -> str | None:
        return canonical_number(line)

    def _first(self, text: str) -> str | None:
        return next(numbers_in(text), (None, ""))[0]

    def _anywhere(self, problem: Problem, text: str) -> str | None:
        return [None, *(number for number, _ in numbers_in(text))][-1]

    def _marked(self, answer: str) -> str:
        return f"#### {answer}"


class LetterFormat(AnswerFormat):
    """The format of CommonsenseQA: an answer is one of A to E."""

    symbols = any_symbol = re.compile(r"[A-E]")
    conclusion = "\nTherefore, among A through E, the answer is"
    finished = re.compile(r"^(?=[^\n]*+\n)(?>[^\n]*?answer is)[^\n]*\([a-e]\)", re.IGNORECASE | re.MULTILINE)
    strictly = (
        "a first line that is A to E alone or begins with a letter in parentheses and has no other parentheses, or the "
        "last letter in parentheses of the line that concludes: the first that says 'answer is', or 'answer', with "
        "one, or else the last with one before a blank line"
    )
    leniently = (
        "the first letter in parentheses, else the first capital A to E that stands alone and is no article, else the "
        "only choice whose text is there"
    )
    concluding = (
        "after the sentence that asks for it, on the first line with one, the first letter in parentheses, else the "
        "first capital A to E that stands alone and is no article"
    )

    def prompt(self, problem: Problem) -> str:
        *stem, _, a, b, c, d, e = problem.question.split("\n")
        choices = [f"({line[1].upper()}){line[3:]}" for line in (a, b, c, d, e)]
        return "\n".join(["Q: " + " ".join(stem), *choices, "A:"])

    def answer(self, problem: Problem) -> str:
        return problem.answer.upper()

    def is_concluded(self, text: str) -> bool:
        *ended, last = text.split("\n")
        return (
            NEXT_QUESTION in text
            or _IN_PARENTHESES.search(last) is not None
            or self._first("\n".join(ended)) is not None
        )

    def _direct(self, line: str) -> str | None:
        found = _ANSWER_LINE.fullmatch(line.strip())
        return None if found is None else found[1] or found[2]

    def _first(self, text: str) -> str | None:
        """Returns the letter in parentheses of the first line that has a letter, else the first capital letter alone.

        A lower-case letter counts in parentheses only: it would be found in `a river`.
        """
        return next((letter for line in text.split("\n") if (letter := first_letter(line)) is not None), None)

    def _anywhere(self, problem: Problem, text: str) -> str | None:
        letter = first_letter(text)
        if letter is not None:
            return letter
        choices = {line[4:].lower(): line[1] for line in problem.question.split("\n")[-5:]}
        longest_first = sorted(choices, key=len, reverse=True)  # `bank` is not found within `river bank`
        named = set(re.findall(rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(?!\w)", text.lower()))
        return choices[named.pop()] if len(named) == 1 else None

    def _marked(self, answer: str) -> str:
        return f"({answer.lower()})"


FORMATS: dict[str, type[AnswerFormat]] = {"gsm8k": NumberFormat, "commonsenseqa": LetterFormat}


def load_format(name: str, data: Path | None) -> AnswerFormat:
    """Returns the format of a task.

    Args:
        name: Name of the task, `gsm8k` or `commonsenseqa`.
        data: Directory with a folder of that name, or the task's own directory or file; None for the public dataset.
    """
    options = ProblemOptions()
    if data is not None:
        place = data / name if path_kind(data / name, "data") == "directory" else data
        options.path = str(place)
        if path_kind(place, "data") == "file":
            options.test_path = str(place)
    task = load_task(name, options)
    return FORMATS[name](task)
