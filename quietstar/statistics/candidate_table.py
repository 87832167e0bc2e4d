"""The table of all measures that are made of several candidates per problem."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from quietstar.errors import ConfigError
from quietstar.statistics.candidates import (
    SUBSETS,
    Candidates,
    check_candidates,
    majority_votes,
    pass_at_k,
    weighted_vote_at_k,
)
from quietstar.statistics.intervals import RESAMPLES, Array, Interval, bootstrap_intervals
from quietstar.statistics.ranking import Discrimination, discrimination, rank_weights, ranked_correctness

Measure = Literal["pass", "maj", "best-of", "weighted-vote"]


@dataclass(frozen=True)
class Row:
    """A measure at one k.

    Args:
        measure: `pass`, `maj`, `best-of` or `weighted-vote`.
        k: Number of candidates drawn.
        score: Name of the score that ranks or weights the candidates; None for `pass` and `maj`.
        value: Mean of the measure over problems.
    """

    measure: Measure
    k: int
    score: str | None
    value: Interval


@dataclass(frozen=True)
class Difference:
    """Best-of-k with one score minus another way to choose, on the same problems.

    Args:
        k: Number of candidates drawn.
        score: Name of the score that ranks the candidates.
        measure: The other way to choose: `maj`, or `best-of` or `weighted-vote` with the score `other`.
        other: Name of the other score; None for `maj`.
        value: Mean of the difference over problems.
    """

    k: int
    score: str
    measure: Measure
    other: str | None
    value: Interval


@dataclass(frozen=True)
class CandidateTable:
    """The result of `measure_candidates`.

    Args:
        problems: Number of problems measured.
        fewest: Number of candidates of the problem with the fewest.
        rows: Measures in the order of measure, score and k.
        differences: Differences between the compared score and all other ways to choose; empty without one.
        discrimination: AUROC by the name of the score.
    """

    problems: int
    fewest: int
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    discrimination: dict[str, Discrimination]

    def value(self, measure: Measure, k: int, score: str | None = None) -> Interval:
        """Returns the value of one row.

        Raises:
            KeyError: There is no such row.
        """
        for row in self.rows:
            if (row.measure, row.k, row.score) == (measure, k, score):
                return row.value
        raise KeyError((measure, k, score))

    def to_json(self) -> dict[str, Any]:
        """Returns the table as dicts, lists, strings, numbers and None."""
        return asdict(self)


def measure_candidates(
    problems: Sequence[Candidates],
    ks: Sequence[int],
    *,
    compare: str | None = None,
    logarithmic: Collection[str] = (),
    subsets: int = SUBSETS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> CandidateTable:
    """Measures pass@k, maj@k, and Best-of-k and weighted votes with every score, with bootstrap intervals over
    problems.

    All measures see the same draws of problems, and all weighted votes of a problem the same subsets.

    Args:
        problems: Candidates of each problem; all have the same names of scores.
        ks: Values of k; those above the number of candidates of any problem are left out.
        compare: Name of the score whose Best-of-k is compared with all other ways to choose; None for no comparison.
        logarithmic: Names of the scores that are logarithms, such as log-likelihoods; votes are weighted by their
            exponentials. Another score gets a weighted vote where none of its values is negative or infinite.
        subsets: Largest number of subsets that a weighted vote looks at; see `weighted_vote_at_k`.
        resamples: Number of bootstrap draws.
        seed: Seed of the bootstrap draws and of the subsets.

    Raises:
        DataError: `check_candidates` refuses the problems.
        ConfigError: No k is left, or `compare` or `logarithmic` is not the name of a score.
    """
    names = check_candidates(problems)
    for name in [*logarithmic, *([] if compare is None else [compare])]:
        if name not in names:
            raise ConfigError(f"{name}: is not a score; there are {', '.join(names) or 'none'}")
    fewest = min(len(problem.answers) for problem in problems)
    kept = sorted({k for k in ks if k <= fewest})
    if not kept or kept[0] < 1:
        raise ConfigError(f"ks: are {list(ks)}; needs one from 1 to the number of candidates, {fewest}, and none below")
    weighing = [name for name in names if name in logarithmic or all(_are_weights(p.scores[name]) for p in problems)]
    columns: list[tuple[Measure, str | None]] = [("pass", None), ("maj", None)]
    columns += [("best-of", name) for name in names] + [("weighted-vote", name) for name in weighing]
    votes = {name: name in logarithmic for name in weighing}
    values = np.zeros((len(problems), len(columns), len(kept)))
    for place, problem in enumerate(problems):
        values[place] = _problem_values(problem, names, votes, kept, subsets, (seed, place))
    keys = [(*column, k) for column in columns for k in kept]
    flat = values.reshape(len(problems), -1)
    intervals = bootstrap_intervals(flat, resamples, seed)
    rows = tuple(Row(measure, k, name, value) for (measure, name, k), value in zip(keys, intervals, strict=True))
    differences = () if compare is None else _differences(flat, keys, compare, resamples, seed)
    labels = [problem.correct for problem in problems]
    areas = {name: discrimination([problem.scores[name] for problem in problems], labels) for name in names}
    return CandidateTable(len(problems), fewest, rows, differences, areas)


def _differences(
    values: Array, keys: Sequence[tuple[Measure, str | None, int]], compare: str, resamples: int, seed: int
) -> tuple[Difference, ...]:
    """Returns Best-of-k of `compare` minus each other column at the same k; `values` is float64 [problems, columns]."""
    ours = {key[2]: values[:, place] for place, key in enumerate(keys) if key[:2] == ("best-of", compare)}
    others = [place for place, key in enumerate(keys) if key[0] != "pass" and key[:2] != ("best-of", compare)]
    gaps = np.stack([ours[keys[place][2]] - values[:, place] for place in others], axis=1)
    found = zip((keys[place] for place in others), bootstrap_intervals(gaps, resamples, seed), strict=True)
    return tuple(Difference(k, compare, measure, name, value) for (measure, name, k), value in found)


def _are_weights(scores: Sequence[float]) -> bool:
    return min(scores) >= 0 and max(scores) < math.inf


def _problem_values(
    problem: Candidates,
    names: Sequence[str],
    votes: Mapping[str, bool],
    ks: Sequence[int],
    subsets: int,
    seed: tuple[int, int],
) -> list[list[float]]:
    """Returns the columns of the table for one problem, each at every k."""
    right = problem.correct
    total, solved = len(right), int(sum(right))
    found = [[pass_at_k(total, solved, k) for k in ks], majority_votes(problem.answers, right, ks).tolist()]
    for name in names:
        ranked = ranked_correctness(problem.scores[name], right)
        found.append([float(rank_weights(total, k) @ ranked) for k in ks])
    for name, logarithmic in votes.items():
        given = (problem.answers, problem.scores[name], right)
        vote = [weighted_vote_at_k(*given, k, logarithmic=logarithmic, subsets=subsets, seed=seed) for k in ks]
        found.append(vote)
    return found
