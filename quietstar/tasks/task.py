"""What a task is: problems, how they are asked, and how an answer is found in a completion and judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Problem:
    """A question with its gold answer.

    Args:
        id: Its name, unlike any other in its split.
        question: As the task's data has it.
        answer: The final answer alone, as `Task.canonical` writes it.
        rationale: A human-written solution, where there is one.
        group: What results are broken down by, such as a number of digits or a subject.
        place: `file:line` that it was read from, for messages.
    """

    id: str
    question: str
    answer: str
    rationale: str | None = None
    group: str = ""
    place: str = ""


@dataclass(frozen=True)
class Verdict:
    """What the check of a completion has found.

    Args:
        answer: The completion's final answer as `Task.canonical` writes it; None where it has none.
        correct: Whether it is the gold answer.
        failure: Why the check itself did not come to an end (it raised, hung or exited); then `correct` is False.
    """

    answer: str | None
    correct: bool
    failure: str | None = None


@dataclass(frozen=True)
class Demonstration:
    """A human-written training example.

    Args:
        prompt: As a model is asked.
        completion: What it is to answer.
        name: For messages.
        problem: Id of the training problem that it solves; empty where it is none of them.
    """

    prompt: str
    completion: str
    name: str = ""
    problem: str = ""


class Task(ABC):
    """A kind of problem. A task of your own needs a name, problems, a prompt and the extraction of an answer.

    A model continues `few_shot(hint) + prompt(problem, hint)`; what it writes up to the end-of-sequence token, or the
    first of `stop`, is the completion.

    Attributes:
        name: Of the task.
        stop: Strings at which a completion ends, for base models that run on; they are not a part of it.
        isolated: Whether `check` runs code that may hang, raise or end the process, and is therefore called in worker
            processes with a time limit.
        symbols: All characters of prompts and completions, where a character model is made for the task on the spot.
    """

    name: str
    stop: tuple[str, ...] = ()
    isolated: bool = True
    symbols: str = ""

    @abstractmethod
    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split, in an order that is always the same.

        Raises:
            DataError: The data has a missing field, a duplicate id or a gold answer that cannot be read, with its
                file:line.
        """

    @abstractmethod
    def prompt(self, problem: Problem, hint: bool = False) -> str:
        """What the model continues. With `hint` it shows the final answer, and nothing else of the solution."""

    @abstractmethod
    def extract(self, completion: str) -> str | None:
        """The final answer in a completion, as `canonical` writes it; None where there is none."""

    def few_shot(self, hint: bool = False) -> str:
        """Solved examples that stand before a prompt, with the separator that follows them."""
        return ""

    def canonical(self, answer: str) -> str:
        """One way to write each answer: equal answers are equal texts. Majority votes count these."""
        return answer.strip()

    def check(self, problem: Problem, completion: str) -> Verdict:
        """Judges a completion."""
        answer = self.extract(completion)
        return Verdict(answer, answer is not None and answer == self.canonical(problem.answer))

    def warm_up(self) -> None:
        """Loads what `check` needs, before the time of a check counts."""
        return

    def accepted(self, completion: str) -> str:
        """A completion as it is trained on: without what follows its answer."""
        return completion.rstrip()

    def solution(self, problem: Problem) -> str | None:
        """The human-written solution as a completion; None where there is none."""
        return problem.rationale

    def demonstrations(self) -> Sequence[Demonstration]:
        """Human-written examples (V-STaR's D_SFT): those solutions of the training problems that there are."""
        solved = ((problem, self.solution(problem)) for problem in self.problems("train"))
        return [
            Demonstration(self.prompt(problem), solution, problem.place or problem.id, problem.id)
            for problem, solution in solved
            if solution is not None
        ]

    def pretraining(self) -> Sequence[Demonstration]:
        """What a character model made for the task learns first."""
        return self.demonstrations()

    def steps(self, completion: str) -> list[str]:
        """The steps of a completion, which joined are the completion."""
        return completion.splitlines(keepends=True)

    def solution_key(self, completion: str) -> str:
        """Equal for completions that solve a problem in the same way; duplicates are found by it."""
        return " ".join(completion.split())

    def right_inside(self, problem: Problem, completion: str) -> bool | None:
        """Whether every step of a completion is right, where the task can tell; else None."""
        return None

    def quotes_hint(self, problem: Problem, completion: str) -> bool:
        """Whether a rationalised completion speaks of the hint, and so makes no sense without it."""
        return False
