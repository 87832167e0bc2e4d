"""A task of a few one-digit sums: those held out are none of those to train on, and some have human solutions."""

from __future__ import annotations

from collections.abc import Sequence

from quietstar.config.loops import ProblemOptions
from quietstar.tasks.addition import Addition
from quietstar.tasks.task import Demonstration, Problem, Split

TASK = "tests.outer_loop.few_sums:FewSums"
SUMS: dict[Split, tuple[str, ...]] = {
    "train": ("2+0", "4+2", "4+5", "4+8", "7+0", "9+9", "0+0", "4+0"),
    "test": ("5+6", "6+7", "7+6", "8+8", "0+5", "4+9", "5+3", "9+7"),
}
"""Those that the base of `loops.make_base` knows by halves."""
SOLVED = ("4+8", "9+9")
OF_NO_PROBLEM = ("1+1=", "1+1+0=20;>2.")
"""A prompt and its completion."""


def worked_out(name: str) -> str:
    """The one right completion of a sum such as `4+8`."""
    first, second = map(int, name.split("+"))
    total = first + second
    return f"{first}+{second}+0={total % 10}{total // 10};>{total}."


class FewSums(Addition):
    """The sums of `SUMS`."""

    def __init__(self, options: ProblemOptions) -> None:
        super().__init__(options)
        by_id = {problem.id: problem for problem in super().problems("train")}
        self._few: dict[Split, list[Problem]] = {split: [by_id[one] for one in names] for split, names in SUMS.items()}

    def problems(self, split: Split) -> Sequence[Problem]:
        return self._few[split]

    def demonstrations(self) -> Sequence[Demonstration]:
        solved = [Demonstration(f"{name}=", worked_out(name), name, name) for name in SOLVED]
        return [*solved, Demonstration(*OF_NO_PROBLEM, "of no problem")]
