"""How a sum is written down: the scratchpad that STaR published, and one that small models learn faster."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod

LOCAL_CHARACTERS = "0123456789+=;?#>."
"""All that the `local` formats are written with."""


class Scratchpad(ABC):
    """One way to ask for the sum of two numbers with equally many digits, and to work it out.

    Args:
        reverse: Results have their least significant digit first.
    """

    def __init__(self, reverse: bool = False) -> None:
        self.reverse = reverse

    @abstractmethod
    def prompt(self, a: int, b: int, hint: bool = False) -> str:
        """What is continued. The hint is the sum with one digit more than the summands, its last carry."""

    @abstractmethod
    def solution(self, a: int, b: int) -> str:
        """The one right completion."""

    @abstractmethod
    def copied_solution(self, a: int, b: int) -> str:
        """A completion that copies the result from the hint and works nothing out."""

    @abstractmethod
    def find(self, completion: str) -> re.Match[str] | None:
        """Where the result is, as it is written, in group 1; a completion is of no interest after the match's end."""

    def answer(self, completion: str) -> str | None:
        """The result, most significant digit first and without white space; None where there is none."""
        found = self.find(completion)
        return None if found is None else self._turn(found[1].replace(" ", ""))

    def accepted(self, completion: str) -> str:
        """A completion up to its result."""
        found = self.find(completion)
        return completion.rstrip() if found is None else completion[: found.end()].rstrip()

    def steps(self, completion: str) -> list[str]:
        """What is written for one pair of digits each, and what is not."""
        return completion.splitlines(keepends=True)

    def _turn(self, digits: str) -> str:
        return digits[::-1] if self.reverse else digits

    def _hint(self, a: int, b: int) -> str:
        return self._turn(f"{a + b:0{len(str(a)) + 1}d}")


class Local(Scratchpad):
    """`298+376=` goes on as `8+6+0=41;9+7+1=71;2+3+1=60;>674.`; with the hint the prompt is `298+376?0674=`.

    Each step carries all that it needs: both digits and the carry, then the digit of the sum and the next carry.
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
    """`298+376#` goes on as `674.`"""

    def prompt(self, a: int, b: int, hint: bool = False) -> str:
        return super().prompt(a, b, hint)[:-1] + "#"

    def solution(self, a: int, b: int) -> str:
        return f"{self._turn(str(a + b))}."

    def find(self, completion: str) -> re.Match[str] | None:
        return re.match(r"(\d+)\.", completion)


class Paper(Scratchpad):
    """STaR's (arXiv 2203.14465, Figure 3), letter by letter; with the hint a line is `Target: 0 6 7 4`.

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
"""Worked out, and the result alone."""


def _pairs(a: int, b: int) -> list[tuple[int, int]]:
    """The digits of both numbers in pairs, least significant first."""
    return [(int(first), int(second)) for first, second in zip(str(a)[::-1], str(b)[::-1], strict=True)]


def _spaced(number: int | str) -> str:
    return " ".join(str(number))
