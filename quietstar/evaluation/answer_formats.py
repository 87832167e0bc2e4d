"""How a task is asked without examples, and how its answers are written: the formats of the paper's evaluation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from quietstar.errors import ConfigError, DataError
from quietstar.tasks.numbers import canonical_number
from quietstar.tasks.options import ProblemOptions
from quietstar.tasks.registry import load_task
from quietstar.tasks.task import Problem, Task

STEP_BY_STEP = " Let's think step by step."
NEXT_QUESTION = "\nQ:"
_NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_LETTER = re.compile(r"\(?([A-Ea-e])\b")
_ONE_LETTER = re.compile(r"\(?([A-Ea-e])\)?\.?")


@dataclass(frozen=True)
class AnswerFormat:
    """A task in the zero-shot format of the paper: `Q: ...\\nA:`, answered by ` 72` or ` C` and a line end.

    Args:
        task: Reads and judges.
        symbols: What one token of an answer may spell, as a regular expression.
        any_symbol: A character of the answer's alphabet.
        conclusion: Ends a chain of thought, so that the answer comes next (arXiv 2205.11916, 2.2).
        finished: Text after which a written-out answer is complete.
    """

    task: Task
    symbols: re.Pattern[str]
    any_symbol: re.Pattern[str]
    conclusion: str
    finished: re.Pattern[str]

    def prompt(self, problem: Problem) -> str:
        """The question up to `A:`."""
        if self.task.name == "gsm8k":
            return f"Q: {problem.question}\nA:"
        *stem, _, a, b, c, d, e = problem.question.split("\n")
        choices = [f"({line[1].upper()}){line[3:]}" for line in (a, b, c, d, e)]
        return "\n".join(["Q: " + " ".join(stem), *choices, "A:"])

    def answer(self, problem: Problem) -> str:
        """What follows after a space: `72`, `C`."""
        return problem.answer if self.task.name == "gsm8k" else problem.answer.upper()

    def is_complete(self, completion: str) -> bool:
        """Whether what would still be written changes nothing."""
        first_line, ended, _ = completion.lstrip().partition("\n")
        return (
            NEXT_QUESTION in completion
            or self.finished.search(completion) is not None
            or (bool(ended) and self._direct(first_line) is not None)
        )

    def for_checker(self, completion: str) -> str:
        """A completion as the task's own checker reads it: an answer that stands alone on the first line is marked."""
        kept = completion.partition(NEXT_QUESTION)[0]
        alone = self._direct(kept.lstrip().partition("\n")[0])
        return kept if alone is None else self._marked(alone)

    def concluded(self, text: str) -> str:
        """The same for what follows the conclusion: the first number or letter counts."""
        found = (_NUMBER if self.task.name == "gsm8k" else _LETTER).search(text.partition(NEXT_QUESTION)[0])
        return "" if found is None else self._marked(found[0] if self.task.name == "gsm8k" else found[1])

    def chain(self, text: str) -> str:
        """A chain of thought up to where it concludes by itself in the same words, or goes on to another question."""
        return text.partition(NEXT_QUESTION)[0].partition(self.conclusion)[0].rstrip()

    def is_chain_complete(self, text: str) -> bool:
        """Whether `chain` would leave out what would still be written."""
        return NEXT_QUESTION in text or self.conclusion in text

    def is_concluded(self, text: str) -> bool:
        """Whether that number or letter is all there: something else follows it."""
        found = (_NUMBER if self.task.name == "gsm8k" else _LETTER).search(text)
        return NEXT_QUESTION in text or (found is not None and found.end() < len(text.rstrip(" .,")))

    def _direct(self, line: str) -> str | None:
        if self.task.name == "gsm8k":
            return canonical_number(line)
        found = _ONE_LETTER.fullmatch(line.strip())
        return None if found is None else found[1]

    def _marked(self, answer: str) -> str:
        return f"#### {answer}" if self.task.name == "gsm8k" else f"({answer.lower()})"


def load_format(name: str, data: Path | None) -> AnswerFormat:
    """A task by its name, `gsm8k` or `commonsenseqa`.

    Args:
        name: Of the task.
        data: Directory with a folder of that name, or the task's own directory or file; None: its public home.
    """
    options = ProblemOptions()
    if data is not None:
        place = data / name if (data / name).is_dir() else data
        options.path = str(place)
        if place.is_file():
            options.test_path = str(place)
    task = load_task(name, options)
    if name == "gsm8k":
        return AnswerFormat(
            task,
            re.compile(r"[0-9]+"),
            re.compile(r"[0-9]"),
            "\nTherefore, the answer (arabic numerals) is",
            re.compile(r"####[^\n]*\S[^\n]*\n"),
        )
    return AnswerFormat(
        task,
        re.compile(r"[A-E]"),
        re.compile(r"[A-E]"),
        "\nTherefore, among A through E, the answer is",
        re.compile(r"answer is[^\n]*\([a-e]\)[^\n]*\n", re.IGNORECASE),
    )


def read_text(path: Path) -> str:
    """A held-out text.

    Raises:
        ConfigError: There is no such file.
        DataError: It is not UTF-8, or empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"text: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text: byte {error.start}") from None
    if not text.strip():
        raise DataError(f"{path}: has no text in it")
    return text
