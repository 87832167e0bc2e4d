"""Rankings of the candidates for one problem: by a verifier's score, by majority, and by weighted votes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from quietstar.errors import ConfigError, DataError

RankBy = Literal["score", "majority", "weighted"]
Process = Literal["product", "minimum", "last"]


def rank(
    by: RankBy,
    *,
    scores: Sequence[float] | None = None,
    answers: Sequence[str | None] | None = None,
    weights: Sequence[float] | None = None,
) -> list[int]:
    """The candidates' indices, best first.

    In a vote the candidates of one answer follow each other. Answers with equal votes are in the order of their best
    scores, then of their first candidates; candidates without an answer come last.

    Args:
        by: `score`: the highest first. `majority`: the most frequent answer first (self-consistency, arXiv 2203.11171).
            `weighted`: the answer with the largest sum of weights first.
        scores: One for each candidate; for `majority` they only break ties, and may be left out.
        answers: Final answers, for votes; equal ones are equal texts, None is no answer.
        weights: At least 0 each, for `weighted`; see `vote_weights`.

    Raises:
        ConfigError: What `by` needs is missing.
        DataError: They are not equally many.
    """
    given = {"scores": scores, "answers": answers, "weights": weights}
    needed = {"score": ["scores"], "majority": ["answers"], "weighted": ["answers", "weights"]}[by]
    for name in needed:
        if given[name] is None:
            raise ConfigError(f"{name}: missing; ranking by {by} needs them")
    counts = {name: len(values) for name, values in given.items() if values is not None}
    if len(set(counts.values())) > 1:
        raise DataError(f"candidates: got {', '.join(f'{count} {name}' for name, count in counts.items())}")
    places = range(next(iter(counts.values())))
    own = [0.0] * len(places) if scores is None else list(scores)
    if by == "score" or answers is None:
        return sorted(places, key=lambda place: -own[place])
    votes = count_votes(answers, weights if by == "weighted" else None)
    best: dict[str, float] = {}
    first: dict[str, int] = {}
    for place, answer in enumerate(answers):
        if answer is not None:
            best[answer] = max(best.get(answer, -math.inf), own[place])
            first.setdefault(answer, place)

    def key(place: int) -> tuple[float, float, float, float]:
        answer = answers[place]
        if answer is None:
            return math.inf, 0.0, 0.0, -own[place]
        return -votes[answer], -best[answer], first[answer], -own[place]

    return sorted(places, key=key)


def count_votes(answers: Sequence[str | None], weights: Sequence[float] | None = None) -> dict[str, float]:
    """Votes for each answer: how many candidates have it, or the sum of their weights."""
    votes: dict[str, float] = {}
    for place, answer in enumerate(answers):
        if answer is not None:
            votes[answer] = votes.get(answer, 0.0) + (1.0 if weights is None else weights[place])
    return votes


def vote_weights(scores: Sequence[float], logarithmic: bool) -> list[float]:
    """What each candidate's vote counts.

    Args:
        scores: Of a verifier, at least one.
        logarithmic: They are log-likelihoods or log-ratios, whose weights are their exponentials (scaled to the sum 1);
            or else probabilities, which are weights themselves.
    """
    if not logarithmic:
        return [max(0.0, score) for score in scores]
    highest = max(scores)
    weights = [math.exp(score - highest) for score in scores]
    return [weight / sum(weights) for weight in weights]


def process_score(scores: Sequence[float], how: Process = "product") -> float:
    """One number for a solution from the scores of its steps (Lightman et al., arXiv 2305.20050, App. F).

    Args:
        scores: One for each step, at least one.
        how: `product` (all steps are right, where scores are probabilities), `minimum` (the weakest step), or `last`.

    Raises:
        DataError: There is no step.
        ConfigError: `how` is something else.
    """
    if not scores:
        raise DataError("steps: got none, needs at least one")
    if how == "product":
        return math.prod(scores)
    if how == "minimum":
        return min(scores)
    if how == "last":
        return scores[-1]
    raise ConfigError(f"how: got {how!r}, needs product, minimum or last")
