"""Routes between numbers: a synthetic task with many right ways to each answer, and wrong ones that look plausible."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from functools import cache

from quietstar.config.loops import ProblemOptions
from quietstar.config.options import check
from quietstar.errors import ConfigError
from quietstar.tasks.task import Demonstration, Problem, Split, Task, Verdict

OPERATIONS = "+-*"
OPERANDS = range(2, 10)
HIGHEST, HIGHEST_START, LOWEST_TARGET = 70, 35, 10
FEWEST_ROUTES = 8
"""Least number of right routes of a problem: one that has few is nearly solved by likelihood alone."""

SOLVED = 300
"""Number of training problems with a demonstrated solution: the first ones."""

PRETRAINING_LINES = 80_000
SPLIT_SEED = 4321
"""Seed of the split: held-out problems are the same for every seed of the training problems."""

_ROUTE = re.compile(r"[-+*]\d=\d{1,2}" * 3)
_STEP = re.compile(r"([-+*])(\d)=(\d{1,2})")


class Routes(Task):
    """`07>58:` asks for a route from 7 to 58 and is continued by `*9=63-8=55+3=58`.

    Three steps use addition, subtraction and multiplication once each, in any order, with operands from 2 to 9. Every
    value is between 1 and 70, and is the left operand of the next step. The answer that majorities vote on is the
    operations of the route in their order, `*9-8+3`, because the number that it ends at is in the question. Problems
    have at least 8 right routes, so that many right completions share the votes and the likelihood.

    Args:
        options: Options of the problems; `per_group`, `test_per_group` and `seed` are used.

    Raises:
        ConfigError: There are fewer problems than the options ask for.
    """

    name = "routes"
    isolated = False
    symbols = "0123456789+-*=>:"

    def __init__(self, options: ProblemOptions) -> None:
        check(options, "problems.")
        self._seed = options.seed
        routes = {key: found for key, found in _all_routes().items() if len(found) >= FEWEST_ROUTES}
        keys = list(routes)
        random.Random(SPLIT_SEED).shuffle(keys)
        test, rest = keys[: options.test_per_group], keys[options.test_per_group :]
        if options.per_group > len(rest):
            raise ConfigError(
                f"problems.per_group: got {options.per_group}, but there are {len(keys)} problems, of which "
                f"problems.test_per_group holds out {options.test_per_group}"
            )
        source = random.Random(1000 + options.seed)
        source.shuffle(rest)
        self._problems: dict[Split, list[Problem]] = {
            "train": [
                _problem(key, source.choice(routes[key]) if place < SOLVED else None)
                for place, key in enumerate(rest[: options.per_group])
            ],
            "test": [_problem(key, None) for key in test],
        }

    def problems(self, split: Split) -> Sequence[Problem]:
        return self._problems[split]

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        """Returns the question; the hint adds nothing, because the question has the number that a route ends at."""
        return f"{problem.question}:"

    def extract(self, completion: str) -> str | None:
        """Returns the operations in their order, whatever they result in; None where the text is not a route."""
        if not _ROUTE.fullmatch(completion):
            return None
        return "".join(operation + operand for operation, operand, _ in _STEP.findall(completion))

    def check(self, problem: Problem, completion: str) -> Verdict:
        """Judges a route: it is right where every step is, all three operations are used, and it ends at the target."""
        answer = self.extract(completion)
        return Verdict(answer, answer is not None and self._is_right(problem, completion))

    def right_inside(self, problem: Problem, completion: str) -> bool | None:
        return self.check(problem, completion).correct

    def pretraining(self) -> Sequence[Demonstration]:
        """Returns random routes of two or three steps, with the number that they happen to end at as the target.

        They teach arithmetic alone, and none is between the numbers of a held-out problem.
        """
        held_out = {self.prompt(problem) for problem in self._problems["test"]}
        lines = (line for line in _lines(random.Random(77 + self._seed)) if line[0] not in held_out)
        return [Demonstration(*line) for line in itertools.islice(lines, PRETRAINING_LINES)]

    def steps(self, completion: str) -> list[str]:
        return re.findall(r"[-+*][^-+*]*|[^-+*]+", completion)

    @staticmethod
    def _is_right(problem: Problem, completion: str) -> bool:
        start, target = map(int, problem.question.split(">"))
        value, used = start, set()
        for operation, operand, result in _STEP.findall(completion):
            reached = _apply(operation, value, int(operand)) if int(operand) in OPERANDS else None
            if reached is None or str(reached) != result:
                return False
            value = reached
            used.add(operation)
        return value == target and used == set(OPERATIONS)


def _apply(operation: str, value: int, operand: int) -> int | None:
    """Returns the result of a step; None where it is outside the range of values."""
    result = {"+": value + operand, "-": value - operand, "*": value * operand}[operation]
    return result if 1 <= result <= HIGHEST else None


@cache
def _all_routes() -> dict[tuple[int, int], list[str]]:
    """Returns all right routes of each start and target."""
    found: dict[tuple[int, int], list[str]] = {}
    for start in range(1, HIGHEST_START + 1):
        for order in itertools.permutations(OPERATIONS):
            for text, target in _routes(start, order):
                if target >= LOWEST_TARGET:
                    found.setdefault((start, target), []).append(text)
    return {key: sorted(found[key]) for key in sorted(found)}


def _routes(value: int, operations: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yields all continuations from a value with these operations in their order, and the values that they end at."""
    if not operations:
        yield "", value
        return
    for operand in OPERANDS:
        if (result := _apply(operations[0], value, operand)) is not None:
            for text, target in _routes(result, operations[1:]):
                yield f"{operations[0]}{operand}={result}{text}", target


def _lines(source: random.Random) -> Iterator[tuple[str, str]]:
    while True:
        start, steps = source.randint(1, HIGHEST_START), source.choice((2, 3, 3))
        value: int = start
        text = ""
        for _ in range(steps):
            operation, operand, value = _random_step(source, value)
            text += f"{operation}{operand}={value}"
        yield f"{start:02d}>{value:02d}:", text


def _random_step(source: random.Random, value: int) -> tuple[str, int, int]:
    while True:  # most steps are possible, and one always is: + 2 or - 2
        operation, operand = source.choice(OPERATIONS), source.choice(OPERANDS)
        if (result := _apply(operation, value, operand)) is not None:
            return operation, operand, result


def _problem(key: tuple[int, int], route: str | None) -> Problem:
    start, target = key
    return Problem(f"{start:02d}>{target}", f"{start:02d}>{target}", str(target), rationale=route)
