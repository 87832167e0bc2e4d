"""Sums of two numbers with equally many digits, worked out digit by digit on a scratchpad.

`Addition` draws the problems. The `Scratchpad` classes write a sum down: in the format that STaR published, and in one
that small models learn faster.
"""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import islice

from quietstar.config.loops import ProblemOptions
from quietstar.config.options import check
from quietstar.errors import ConfigError
from quietstar.tasks.file_task import solved_examples
from quietstar.tasks.task import Demonstration, Problem, Split, Task

MOST_DIGITS = 100
SET_ASIDE = 700
"""Sums of each number of digits that are set aside for demonstrations. There are as many whether they are shown or not,
so that the training and held-out problems stay the same."""

ONE_DIGIT, TWO_DIGITS, DIRECT = 5, 400, 5
"""Demonstrations: how often each one-digit sum is shown, the number of two-digit sums, and the number of sums of each
greater number of digits that are shown without steps."""

LOCAL_CHARACTERS = "0123456789+=;?#>."
"""All characters of the `local` formats."""


class Addition(Task):
    """n-digit addition, the synthetic task of STaR.

    Training, held-out and demonstrated problems have no sum in common. The exception is one-digit sums: there are only
    100, and each part has all of them.

    Args:
        options: Options of the problems; `digits`, `per_group`, `test_per_group`, `solved`, `hinted`, `copied`,
            `scratchpad`, `reverse`, `seed` and the few-shot files are used.
        direct: Whether to ask for the result alone, without a scratchpad, for comparison.

    Raises:
        ConfigError: The range of digits is not valid, or there are too few sums of one number of digits.
    """

    isolated = False

    def __init__(self, options: ProblemOptions, *, direct: bool = False) -> None:
        check(options, "problems.")
        self.name = "addition-direct" if direct else "addition"
        self.stop = ("\nInput:",) if options.scratchpad == "paper" else ()
        self.symbols = LOCAL_CHARACTERS if options.scratchpad == "local" else ""
        self.options = options
        self._worked_out, self._direct = (kind(options.reverse) for kind in FORMATS[options.scratchpad])
        self._format: Scratchpad = self._direct if direct else self._worked_out
        self._problems: dict[Split, list[Problem]] = {"test": [], "train": []}
        self._shown: dict[int, list[Problem]] = {}
        source = random.Random(1000 + options.seed)
        for digits in _range(options.digits):
            test, train, self._shown[digits] = _draw(source, digits, self._sizes(digits))
            self._problems["test"] += test
            self._problems["train"] += train

    def _sizes(self, digits: int) -> tuple[int, int, int]:
        shown = (TWO_DIGITS if digits == 2 else self.options.solved + self.options.hinted) + DIRECT
        return self.options.test_per_group, self.options.per_group, max(shown, SET_ASIDE)

    def problems(self, split: Split) -> Sequence[Problem]:
        return self._problems[split]

    def prompt(self, problem: Problem, hint: bool = False) -> str:
        return self._format.prompt(*_summands(problem), hint)

    def few_shot(self, hint: bool = False) -> str:
        return solved_examples(self.options, hint)

    def extract(self, completion: str) -> str | None:
        """Returns the result, most significant digit first, exactly as it stands: a needless zero makes it wrong."""
        return self._format.answer(completion)

    def accepted(self, completion: str) -> str:
        return self._format.accepted(completion)

    def solution(self, problem: Problem) -> str:
        return self._format.solution(*_summands(problem))

    def demonstrations(self) -> Sequence[Demonstration]:
        """Returns worked-out sums that no other part has: few of the longer ones, but many of those with the hint.

        Where the result alone is asked for, they are the results of all training problems.
        """
        if self._format is self._direct:
            return list(_shown(self._direct, self._problems["train"]))
        found: list[Demonstration] = []
        for digits, problems in self._shown.items():
            if digits == 1:
                found += list(_shown(self._worked_out, problems)) * ONE_DIGIT
                continue
            rest = iter(problems)
            found += _shown(self._worked_out, islice(rest, TWO_DIGITS if digits == 2 else self.options.solved))
            hinted = 0 if digits == 2 else self.options.hinted
            copied = round(hinted * self.options.copied)
            found += _shown(self._worked_out, islice(rest, copied), hint=True, copied=True)
            found += _shown(self._worked_out, islice(rest, hinted - copied), hint=True)
            if self.options.scratchpad == "local":  # the published format has the same prompt for both
                found += _shown(self._direct, islice(rest, DIRECT))
        return found

    def steps(self, completion: str) -> list[str]:
        return self._format.steps(completion)

    def right_inside(self, problem: Problem, completion: str) -> bool | None:
        """Returns whether the scratchpad is right in every digit and carry; None where there is no scratchpad."""
        if self._format is self._direct:
            return None
        return self.accepted(completion) == self.solution(problem)


def _range(digits: str) -> range:
    match = re.fullmatch(r"\s*(\d{1,3})\s*(?:-\s*(\d{1,3})\s*)?", digits)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last <= MOST_DIGITS:
        raise ConfigError(f"problems.digits: got {digits!r}, needs a range such as 1-5, up to {MOST_DIGITS}")
    return range(first, last + 1)


def _draw(source: random.Random, digits: int, sizes: tuple[int, int, int]) -> tuple[list[Problem], ...]:
    """Returns held-out, training and demonstrated problems; no two are the same, except those of one digit."""
    if digits == 1:
        sums = [_problem(a, b, 1) for a in range(10) for b in range(10)]
        return sums, sums, sums
    low, high = 10 ** (digits - 1), 10**digits
    if sum(sizes) > (most := (high - low) ** 2 // 2):
        raise ConfigError(
            f"problems.per_group: {sum(sizes)} sums of {digits} digits are too many for a fair draw "
            f"({sizes[1]} to train on, {sizes[0]} held out, {sizes[2]} demonstrations), needs {most} or fewer"
        )
    drawn: dict[tuple[int, int], None] = {}  # a set that keeps its order
    while len(drawn) < sum(sizes):
        drawn[source.randrange(low, high), source.randrange(low, high)] = None
    rest = iter([_problem(a, b, digits) for a, b in drawn])
    return tuple(list(islice(rest, size)) for size in sizes)


def _problem(a: int, b: int, digits: int) -> Problem:
    return Problem(f"{a}+{b}", f"{a} + {b}", str(a + b), group=f"{digits} digit{'s' if digits > 1 else ''}")


def _summands(problem: Problem) -> tuple[int, int]:
    a, _, b = problem.question.partition(" + ")
    return int(a), int(b)


def _shown(
    form: Scratchpad, problems: Iterable[Problem], hint: bool = False, copied: bool = False
) -> Iterable[Demonstration]:
    for problem in problems:
        a, b = _summands(problem)
        solution = form.copied_solution(a, b) if copied else form.solution(a, b)
        yield Demonstration(form.prompt(a, b, hint), solution, problem.id)


class Scratchpad(ABC):
    """One way to ask for the sum of two numbers with equally many digits, and to work it out.

    Args:
        reverse: Whether results have their least significant digit first.
    """

    def __init__(self, reverse: bool = False) -> None:
        self.reverse = reverse

    @abstractmethod
    def prompt(self, a: int, b: int, hint: bool = False) -> str:
        """Returns the text that is continued. The hint is the sum with one digit more than the summands, its last
        carry.
        """

    @abstractmethod
    def solution(self, a: int, b: int) -> str:
        """Returns the only right completion."""

    @abstractmethod
    def copied_solution(self, a: int, b: int) -> str:
        """Returns a completion that copies the result from the hint and works nothing out."""

    @abstractmethod
    def find(self, completion: str) -> re.Match[str] | None:
        """Finds the result, as it is written, in group 1; everything after the end of the match is ignored."""

    def answer(self, completion: str) -> str | None:
        """Returns the result, most significant digit first and without white space; None where there is none."""
        found = self.find(completion)
        return None if found is None else self._turn(found[1].replace(" ", ""))

    def accepted(self, completion: str) -> str:
        """Returns a completion up to its result."""
        found = self.find(completion)
        return completion.rstrip() if found is None else completion[: found.end()].rstrip()

    def steps(self, completion: str) -> list[str]:
        """Returns the steps of a completion: one for each pair of digits, and the rest."""
        return completion.splitlines(keepends=True)

    def _turn(self, digits: str) -> str:
        return digits[::-1] if self.reverse else digits

    def _hint(self, a: int, b: int) -> str:
        return self._turn(f"{a + b:0{len(str(a)) + 1}d}")


class Local(Scratchpad):
    """`298+376=` is continued by `8+6+0=41;9+7+1=71;2+3+1=60;>674.`; with the hint the prompt is `298+376?0674=`.

    Each step has all that it needs: both digits and the carry, then the digit of the sum and the next carry.
    """

    def prompt(self, a: int, b: int, hint: bool = False) -> str:
        return f"{a}+{b}?{self._hint(a, b)}=" if hint else f"{a}+{b}="

    def solution(self, a: int, b: int) -> str:
        steps, carry = [], 0
        for first, second in _pairs(a, b):
            total = first + second + carry
            steps.append(f"{first}+{second}+{carry}={total % 10}{total // 10};")
            carry = total // 10
        return f"{''.join(steps)}>{self._turn(str(a + b))}."

    def copied_solution(self, a: int, b: int) -> str:
        return f">{self._turn(str(a + b))}."

    def find(self, completion: str) -> re.Match[str] | None:
        return re.search(r">(\d+)\.", completion)

    def steps(self, completion: str) -> list[str]:
        return re.findall(r"[^;]*;|[^;]+", completion)


class LocalDirect(Local):
    """`298+376#` is continued by `674.`"""

    def prompt(self, a: int, b: int, hint: bool = False) -> str:
        return super().prompt(a, b, hint)[:-1] + "#"

    def solution(self, a: int, b: int) -> str:
        return f"{self._turn(str(a + b))}."

    def find(self, completion: str) -> re.Match[str] | None:
        return re.match(r"(\d+)\.", completion)


class Paper(Scratchpad):
    """The scratchpad of STaR (arXiv 2203.14465, Figure 3), character by character; with the hint a line is `Target: 0 6
    7 4`.

    Each line has the next pair of digits, then the digits of the sum so far and the carry from the pair before.
    """

    def prompt(self, a: int, b: int, hint: bool = False) -> str:
        shown = f" {_spaced(self._hint(a, b))}" if hint else ""
        return f"Input:\n{_spaced(a)} + {_spaced(b)}\nTarget:{shown}\n"

    def solution(self, a: int, b: int) -> str:
        lines, carry, so_far = [f"{_spaced(a)} + {_spaced(b)} , C: 0"], 0, ""
        pairs = _pairs(a, b)
        for place, (first, second) in enumerate(pairs):
            total = first + second + carry
            carry, so_far = total // 10, f"{total % 10}{so_far}"
            following = "{} + {} ".format(*pairs[place + 1]) if place + 1 < len(pairs) else ""
            lines.append(f"{following}, {_spaced(self._turn(so_far))} C: {carry}")
        lines.append(_spaced(self._hint(a, b)))
        return "\n".join(["<scratch>", *lines, "</scratch>", _spaced(self._turn(str(a + b)))])

    def copied_solution(self, a: int, b: int) -> str:
        return "\n".join(["<scratch>", "</scratch>", _spaced(self._turn(str(a + b)))])

    def find(self, completion: str) -> re.Match[str] | None:
        return re.search(r"</scratch>\n(\d(?: \d)*)[ \t]*(?=\n|$)", completion)


class PaperDirect(Paper):
    """The result alone after `Target:`."""

    def solution(self, a: int, b: int) -> str:
        return _spaced(self._turn(str(a + b)))

    def find(self, completion: str) -> re.Match[str] | None:
        return re.match(r"(\d(?: \d)*)[ \t]*(?=\n|$)", completion)


FORMATS: dict[str, tuple[type[Scratchpad], type[Scratchpad]]] = {
    "local": (Local, LocalDirect),
    "paper": (Paper, PaperDirect),
}
"""The scratchpads of each format: with the sum worked out, and with the result alone."""


def _pairs(a: int, b: int) -> list[tuple[int, int]]:
    """Returns the digits of both numbers in pairs, least significant first."""
    return [(int(first), int(second)) for first, second in zip(str(a)[::-1], str(b)[::-1], strict=True)]


def _spaced(number: int | str) -> str:
    return " ".join(str(number))
