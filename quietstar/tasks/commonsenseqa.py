"""Multiple-choice questions of common sense (CommonsenseQA, arXiv 1811.00937), in STaR's prompt format."""

from __future__ import annotations

import re
from itertools import zip_longest
from typing import Any

from quietstar.errors import DataError
from quietstar.tasks.file_task import FileTask, PublicHome, Record, speaks_of_hint
from quietstar.tasks.task import Problem

_LETTERS = "abcde"
_CHOICE = re.compile(r"\(([a-e])\)", re.IGNORECASE)
_CONCLUSIONS = tuple(
    re.compile(words + r".*\([a-e]\)", re.IGNORECASE) for words in (r"\banswer is\b(?! not\b)", r"\banswer\b")
)


class CommonsenseQA(FileTask):
    """A stem and five choices, answered by a rationale that ends in `Therefore, the answer is blotter (e).`

    The data has no human-written rationales. The hint is ` (CORRECT)` after the line of the right choice. The held-out
    problems are the development split, because the test split is published without answers. The solved examples are the
    seven that STaR published, unless the options name others.

    Args:
        options: Options of the problems. `path` is a directory with `train_rand_split.jsonl` and
            `dev_rand_split.jsonl`, or a file.
    """

    name = "commonsenseqa"
    stop = ("\nQ:",)
    isolated = False
    train_files = ("train_rand_split.jsonl",)
    test_files = ("dev_rand_split.jsonl",)
    published_examples = "commonsenseqa"
    home = PublicHome(
        "tau/commonsense_qa",
        "data/train-*.parquet",
        "data/validation-*.parquet",
        "https://www.tau-nlp.org/commonsenseqa",
        "train_rand_split.jsonl and dev_rand_split.jsonl",
    )

    def read(self, record: Record, number: int) -> Problem:
        answer = record.text("answerKey").strip().lower()
        stem, choices = _question(record)
        if answer not in choices:
            raise DataError(
                f"{record.place}: field 'answerKey' is {answer.upper()!r}, needs the label of one of the choices "
                f"({', '.join(label.upper() for label in choices)})"
            )
        lines = [stem, "Answer Choices:", *(f"({label}) {text}" for label, text in choices.items())]
        return Problem(record.text("id"), "\n".join(lines), answer, place=record.place)

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        lines = problem.question.split("\n")
        if hint:
            place = _choice_lines(problem)[problem.answer]
            lines[place] += " (CORRECT)"
        return "Q: " + "\n".join(lines) + "\nA:"

    def extract(self, completion: str) -> str | None:
        """Returns the letter of the last `(x)` of the conclusion, the first line that says `answer is` and has a
        choice.

        Where no line does, the conclusion is the first line with the word `answer` and a choice, or else the last line
        with a choice before the first blank one, so that ` (e).` is an answer too. Text after the conclusion is
        ignored.
        """
        line = _conclusion(completion)
        return None if line is None else _CHOICE.findall(line)[-1].lower()

    def canonical(self, answer: str) -> str:
        return answer.strip().strip("().").lower()

    def accepted(self, completion: str) -> str:
        line = _conclusion(completion)
        if line is None:
            return completion.rstrip()
        return completion[: completion.index(line) + len(line)].rstrip()

    def conclusion(self, problem: Problem) -> str:
        """Returns the sentence that ends every right solution, such as ` Therefore, the answer is blotter (e).`"""
        line = problem.question.split("\n")[_choice_lines(problem)[problem.answer]]
        return f" Therefore, the answer is {line[4:]} ({problem.answer})."

    def direct(self, problem: Problem) -> str:
        """Returns the answer alone as a completion, as in STaR's direct prompts: ` (e).`"""
        return f" ({problem.answer})."

    def quotes_hint(self, problem: Problem, completion: str) -> bool:
        return speaks_of_hint(completion)


def _question(record: Record) -> tuple[str, dict[str, str]]:
    """Returns the stem and the choices by their letters, from a line of the task's own files or a row of the hub's."""
    nested = record.fields.get("question")
    if isinstance(nested, dict):
        record = Record(f"{record.place}: question", nested)
        choices = nested.get("choices")
        stem = record.text("stem")
    else:
        choices = record.fields.get("choices")
        stem = record.text("question")
    return _one_line(stem), _choices(choices, record.place)


def _choices(choices: Any, place: str) -> dict[str, str]:
    if isinstance(choices, dict):  # the hub's rows have lists of labels and of texts
        labels, texts = choices.get("label"), choices.get("text")
        if isinstance(labels, list) and isinstance(texts, list):
            choices = [{"label": label, "text": text} for label, text in zip_longest(labels, texts)]
    if not isinstance(choices, list) or not choices:
        raise DataError(f"{place}: has no list 'choices', needs objects with the fields 'label' and 'text'")
    found = {}
    for number, choice in enumerate(choices, start=1):
        one = Record(f"{place}: choice {number}", choice if isinstance(choice, dict) else {})
        found[one.text("label").strip().lower()] = _one_line(one.text("text"))
    if "".join(found) != _LETTERS:
        raise DataError(f"{place}: the choices are labelled {', '.join(found).upper()}, needs A, B, C, D, E")
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _choice_lines(problem: Problem) -> dict[str, int]:
    """Returns for each letter the line of the question that has its choice, counted from 0."""
    last = problem.question.count("\n")
    return {letter: last - len(_LETTERS) + 1 + place for place, letter in enumerate(_LETTERS)}


def _conclusion(completion: str) -> str | None:
    before = completion.partition("\nQ:")[0]
    for conclusion in _CONCLUSIONS:
        for line in before.split("\n"):
            if conclusion.search(line):
                return line
    paragraph = before.lstrip().partition("\n\n")[0]
    return next((line for line in reversed(paragraph.split("\n")) if _CHOICE.search(line)), None)
