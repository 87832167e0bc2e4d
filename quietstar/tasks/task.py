"""The interface of a task: its problems, the prompts, and how an answer is found in a completion and judged."""

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
        id: Identifier, unique within its split.
        question: Text of the question, as the task's data has it.
        answer: Final answer alone, as `Task.canonical` writes it.
        rationale: Human-written solution, where there is one.
        group: Name of the group that results are broken down by, such as a number of digits or a subject.
        place: `file:line` that the problem was read from, for messages.
    """

    id: str
    question: str
    answer: str
    rationale: str | None = None
    group: str = ""
    place: str = ""


@dataclass(frozen=True)
class Verdict:
    """Result of the check of a completion.

    Args:
        answer: Final answer of the completion, as `Task.canonical` writes it; None where it has none.
        correct: Whether this answer is the gold answer.
        failure: Why the check itself did not finish (it raised, hung or exited); then `correct` is False.
    """

    answer: str | None
    correct: bool
    failure: str | None = None


@dataclass(frozen=True)
class Demonstration:
    """A human-written training example.

    Args:
        prompt: Prompt that a model is given for the problem.
        completion: Text that the model learns to answer the prompt with.
        name: Name of the example in messages.
        problem: Id of the training problem that the example solves; empty where it solves none of them.
    """

    prompt: str
    completion: str
    name: str = ""
    problem: str = ""


class Task(ABC):
    """A kind of problem. A new task needs a name, problems, a prompt and the extraction of an answer.

    A model continues `few_shot(hint) + prompt(problem, hint)`. The completion is what it writes up to the
    end-of-sequence token or the first of `stop`.

    Attributes:
        name: Name of the task.
        stop: Strings that end a completion, for base models that do not stop by themselves; not part of the completion.
        isolated: Whether `check` runs code that may hang, raise or end the process, and is therefore called in worker
            processes with a time limit.
        symbols: All characters of prompts and completions, for tasks that a new character model can be made for; else
            empty.
    """

    name: str
    stop: tuple[str, ...] = ()
    isolated: bool = True
    symbols: str = ""

    @abstractmethod
    def problems(self, split: Split) -> Sequence[Problem]:
        """Returns the problems of a split, in an order that is always the same.

        Raises:
            DataError: The data has a missing field, a duplicate id or a gold answer that cannot be read, with its
                file:line.
        """

    @abstractmethod
    def prompt(self, problem: Problem, hint: bool = False) -> str:
        """Returns the text that the model continues. With `hint` it shows the final answer, and nothing else of the
        solution.
        """

    @abstractmethod
    def extract(self, completion: str) -> str | None:
        """Returns the final answer in a completion, as `canonical` writes it; None where there is none."""

    def few_shot(self, hint: bool = False) -> str:
        """Returns solved examples that stand before a prompt, with the separator that follows them; empty for none."""
        return ""

    def canonical(self, answer: str) -> str:
        """Returns the canonical form of an answer: equal answers have equal texts. Majority votes count these."""
        return answer.strip()

    def check(self, problem: Problem, completion: str) -> Verdict:
        """Judges a completion."""
        answer = self.extract(completion)
        return Verdict(answer, answer is not None and answer == self.canonical(problem.answer))

    def warm_up(self) -> None:
        """Loads what `check` needs, before the time of a check counts."""
        return

    def accepted(self, completion: str) -> str:
        """Returns a completion as it is trained on: without the text after its answer."""
        return completion.rstrip()

    def solution(self, problem: Problem) -> str | None:
        """Returns the human-written solution as a completion; None where there is none."""
        return problem.rationale

    def demonstrations(self) -> Sequence[Demonstration]:
        """Returns human-written examples (V-STaR's D_SFT): the solutions of those training problems that have one."""
        solved = ((problem, self.solution(problem)) for problem in self.problems("train"))
        return [
            Demonstration(self.prompt(problem), solution, problem.place or problem.id, problem.id)
            for problem, solution in solved
            if solution is not None
        ]

    def pretraining(self) -> Sequence[Demonstration]:
        """Returns the examples that a character model made for the task learns first."""
        return self.demonstrations()

    def steps(self, completion: str) -> list[str]:
        """Returns the steps of a completion; joined, they are the completion."""
        return completion.splitlines(keepends=True)

    def solution_key(self, completion: str) -> str:
        """Returns a text that is equal for completions that solve a problem in the same way; duplicates are found by
        it.
        """
        return " ".join(completion.split())

    def right_inside(self, problem: Problem, completion: str) -> bool | None:
        """Returns whether every step of a completion is right; None where the task cannot tell."""
        return None

    def quotes_hint(self, problem: Problem, completion: str) -> bool:
        """Returns whether a rationalised completion mentions the hint, and so makes no sense without it."""
        return False
