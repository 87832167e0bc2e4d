"""Files of candidates: problems with the solutions that are to be ranked.

Rankings of the candidates for one problem: by a verifier's score, by majority, and by weighted votes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quietstar.errors import ConfigError, DataError


@dataclass
class Candidates:
    """The candidates for one problem.

    Args:
        name: Its id, or its prompt's place in the file.
        prompt: What the generator was asked.
        places: `file:line` of each.
        completions: What it wrote.
        answers: Their final answers, where the file has them: None for no answer.
        tokenizers: Hashes of the tokenizers that they were made for, with the place where each is said.
    """

    name: str
    prompt: str
    places: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)
    tokenizers: dict[str, str] = field(default_factory=dict)

    @property
    def has_answers(self) -> bool:
        """Whether the file has them."""
        return len(self.answers) == len(self.completions)


def read_candidates(path: Path, ask: Callable[[str], str] = str) -> list[Candidates]:
    """Problems with their candidates, in the order in which they first occur.

    Each line is an object: `prompt`, or `question` that a prompt is made of; `completions`, a list, or `completion`,
    of which lines with one `id` (or without, one prompt) belong together. Optional are `answers` or `answer` (null: has
    none) and `tokenizer`, the sha256 of `tokenizer_fingerprint`.

    Args:
        path: A JSONL file.
        ask: Question -> prompt.

    Raises:
        ConfigError: The file cannot be read.
        DataError: A line is not such an object, naming file:line, or there is none.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"candidates: cannot read {path} ({error.strerror})") from None
    problems: dict[str, Candidates] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            _add(problems, _object(line, f"{path}:{number}"), f"{path}:{number}", ask)
    if not problems:
        raise DataError(f"{path}: has no candidates, needs one JSON object a line")
    for problem in problems.values():
        if problem.answers and not problem.has_answers:
            raise DataError(f"{problem.places[0]}: some candidates of {problem.name} have an answer and some have none")
    return list(problems.values())


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{place}: is a {type(value).__name__}, needs an object with prompt and completions")
    return value


def _add(problems: dict[str, Candidates], line: dict[str, Any], place: str, ask: Callable[[str], str]) -> None:
    asked = next((name for name in ("prompt", "question") if name in line), None)
    if asked is None or not isinstance(line[asked], str) or not line[asked]:
        raise DataError(f"{place}: {asked or 'prompt'}: missing or no text; needs the prompt, or the question")
    prompt = line[asked] if asked == "prompt" else ask(line[asked])
    single = "completions" not in line
    completions = [line.get("completion")] if single else line["completions"]
    if not isinstance(completions, list) or not completions or not all(isinstance(text, str) for text in completions):
        raise DataError(f"{place}: completions: needs a list of texts, at least one (or completion, a text)")
    identifier = line.get("id")
    key = f"id {identifier}" if identifier is not None else f"prompt {prompt}"
    name = str(identifier) if identifier is not None else place
    problem = problems.setdefault(key, Candidates(name, prompt))
    if problem.prompt != prompt:
        raise DataError(f"{place}: id {identifier} has another prompt than at {problem.places[0]}")
    given = "answer" if single else "answers"
    if given in line:
        answers = [line[given]] if single else line[given]
        if not isinstance(answers, list) or len(answers) != len(completions):
            raise DataError(f"{place}: answers: needs a list of as many as there are completions, {len(completions)}")
        problem.answers += [None if answer is None else str(answer) for answer in answers]
    if "tokenizer" in line:
        made_for = line["tokenizer"]
        made_for = made_for.get("sha256") if isinstance(made_for, dict) else made_for
        problem.tokenizers.setdefault(str(made_for), place)
    problem.completions += completions
    problem.places += [place] * len(completions)


RankBy = Literal["score", "majority", "weighted"]
Score = Literal["sum", "mean", "ratio", "last"]
"""What some kind of verifier can score by."""
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
