"""Several candidates for each of several problems: what a table of measures is made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from quietstar.errors import DataError
from quietstar.evaluation.arguments import numbers, same_length, truths


@dataclass(frozen=True)
class Candidates:
    """One problem's candidates.

    Args:
        problem: Its id.
        answers: [N], None where a candidate has none.
        correct: [N], truth values.
        scores: By the scorer's name [N], higher is better.
    """

    problem: str
    answers: Sequence[str | None]
    correct: Sequence[bool]
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def check(self) -> None:
        """Refuses candidates that cannot be measured.

        Raises:
            DataError: There are none, the lengths differ, or a score is NaN; the message names the problem.
        """
        try:
            truths("correct", self.correct)
            for name, values in self.scores.items():
                numbers(f"scores[{name}]", values)
            scores = {f"scores[{name}]": values for name, values in self.scores.items()}
            same_length(answers=self.answers, correct=self.correct, **scores)
        except DataError as error:
            raise DataError(f"problem {self.problem}: {error}") from None


def check_candidates(problems: Sequence[Candidates]) -> list[str]:
    """Checks every problem's candidates, and that they go together.

    Returns:
        The names of the scores.

    Raises:
        DataError: There is no problem, one has two entries, other scores than the first, or is refused by itself.
    """
    if not problems:
        raise DataError("problems: is empty; needs at least one")
    problem, entries = Counter(candidates.problem for candidates in problems).most_common(1)[0]
    if entries > 1:
        raise DataError(f"problem {problem}: has {entries} entries; needs one with all its candidates")
    names = list(problems[0].scores)
    for candidates in problems:
        candidates.check()
        if set(candidates.scores) != set(names):
            have, first = ", ".join(candidates.scores) or "none", ", ".join(names) or "none"
            raise DataError(f"problem {candidates.problem}: its scores are {have}; needs the first problem's, {first}")
    return names
