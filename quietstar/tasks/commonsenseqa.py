"""Multiple-choice questions of common sense (CommonsenseQA, arXiv 1811.00937), in STaR's prompt format."""

from __future__ import annotations

import re
from itertools import pairwise, zip_longest
from typing import Any

from quietstar.errors import DataError
from quietstar.tasks.file_task import FileTask, PublicHome, Record, speaks_of_hint
from quietstar.tasks.task import Problem

_LETTERS = "abcde"
_BRACKETS = r"[(\[]\W{0,9}[a-e]\W{0,9}[)\]]"  # without a bound, many brackets would take quadratic time
_CHOICE = re.compile(_BRACKETS.replace("[a-e]", "([a-e])"), re.IGNORECASE)
_ARTICLE = r"A (?!(?:as|because|is|since|and|or|but|not)\b)[a-z]"
LETTER_ALONE = re.compile(rf"(?<![\w'\u2019.-])(?!{_ARTICLE})([A-E])(?![\w'\u2019-]|\.\w)")
"""A capital letter of a choice that stands alone and is no article."""
_LAST_LETTER = re.compile(r"(?<![\w'\u2019.-])([a-e])\W*$")
_ANSWER_IS, _ANSWER = re.compile(r"\banswer\s+is\b", re.IGNORECASE), re.compile(r"\banswer\b", re.IGNORECASE)
_DENIED = re.compile(
    r"\b(?:not|nor|neither|never|unlike|except|without|than|instead\s+of|\w+n['\u2019]t)\s+(?:[\w'\u2019-]+\s+){0,6}?"
    rf"(?:{_BRACKETS}|[A-E](?![\w'\u2019-]))|{_BRACKETS}\s+(?:is|are|was)(?:n['\u2019]t|\s+(?:not|wrong|incorrect|false))\b",
    re.IGNORECASE,
)
_PLAINLY_DENIED = re.compile(rf"(?:\bis\s+not|n['\u2019]t|^\s*not)\s+{_BRACKETS}", re.IGNORECASE)
_ALTERNATIVES = re.compile(r"\s*(?:[,/&]|,?\s*\b(?:or|and)\b)\s*", re.IGNORECASE)


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
        """Returns the letter of the conclusion, the first line that says `answer is` and then names a choice, such as
        `(e)` or `E.`

        Where no line does, the conclusion is the first line with the word `answer` and a choice, or else the last line
        with a choice before the first blank one, so that ` (e).` is an answer too. The first choice after `answer is`
        counts, and the last one of another line. Denied choices (`not (b)`) never do; alternatives (`(a) or (b)`) are
        no answer. Text after the conclusion is ignored.
        """
        found = _conclusion(completion)
        return None if found is None else found[1]

    def canonical(self, answer: str) -> str:
        return answer.strip().strip("().").lower()

    def accepted(self, completion: str) -> str:
        found = _conclusion(completion)
        if found is None:
            return completion.rstrip()
        return completion[: completion.index(found[0]) + len(found[0])].rstrip()

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


def _conclusion(completion: str) -> tuple[str, str | None] | None:
    """Returns the line that concludes, with the letter of its choice; None where no line names a choice."""
    before = completion.partition("\nQ:")[0]
    lines = before.split("\n")
    for saying, denied in ((_ANSWER_IS, _DENIED), (_ANSWER_IS, _PLAINLY_DENIED), (_ANSWER, _PLAINLY_DENIED)):
        for line in lines:
            said = saying.search(line)
            if said and (found := _letters(line[said.end() :], denied, alone=True)):
                return line, _one(found, 0)
            if said and saying is _ANSWER and (found := _letters(line, denied)):
                return line, _one(found, -1)
    paragraph = before.lstrip().partition("\n\n")[0]
    for line in reversed(paragraph.split("\n")):
        if found := _letters(line, _PLAINLY_DENIED):
            return line, _one(found, -1)
    return None


def _letters(text: str, denied: re.Pattern[str], alone: bool = False) -> list[re.Match[str]]:
    """Returns the choices that a text names and does not deny.

    Args:
        text: Text of a line, or of its end.
        denied: Regular expression of a denied choice. Some choices of the data begin with `not`.
        alone: Whether a letter counts without parentheses where none has them.
    """
    text = denied.sub(lambda match: " " * len(match[0]), text)
    found = list(_CHOICE.finditer(text))
    if not found and alone:
        found = list(LETTER_ALONE.finditer(text)) or list(_LAST_LETTER.finditer(text))
    return found


def _one(found: list[re.Match[str]], place: int) -> str | None:
    """Returns the letter of the first or the last choice; None where another one stands beside it as an alternative."""
    chosen = found[place]
    for one, other in pairwise(found):
        between = chosen.string[one.end() : other.start()]
        if chosen in (one, other) and one[1].lower() != other[1].lower() and _ALTERNATIVES.fullmatch(between):
            return None
    return chosen[1].lower()
