"""Candidate solutions in order, best first, by a verifier's score, by majority or by weighted votes (`quietstar.rank`).

First come files of candidates, then the rankings of one problem's candidates, then `rank_file`, which joins both.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

from quietstar.config.command_line import Command
from quietstar.config.loops import ProblemOptions
from quietstar.config.options import INPUT_ONCE, Device, Dtype, check_model_path, check_weights_format, path_kind
from quietstar.config.parsing import parse_json
from quietstar.data.shards import read_objects
from quietstar.errors import ConfigError, DataError, naming
from quietstar.tasks import load_task
from quietstar.tasks.task import Problem, Task

if TYPE_CHECKING:
    from quietstar.verifiers.verifier import Verifier


@dataclass
class Candidates:
    """The candidates for one problem.

    Args:
        name: Name of the problem: its id, or the `file:line` where it first occurs.
        prompt: Prompt that the generator was given.
        places: `file:line` of each candidate.
        completions: Completions of the generator.
        answers: Final answers of the candidates, None for a candidate without answer; empty if the file has no answers.
        tokenizers: Hashes of the tokenizers that the candidates were made with; each maps to the `file:line` that names
            it.
    """

    name: str
    prompt: str
    places: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)
    tokenizers: dict[str, str] = field(default_factory=dict)

    @property
    def has_answers(self) -> bool:
        """Whether the answers of all candidates are known."""
        return len(self.answers) == len(self.completions)


def read_candidates(path: Path, ask: Callable[[str], str] = str) -> list[Candidates]:
    """Reads problems with their candidates, in the order in which the problems first occur.

    Each line is an object: `prompt`, or `question`, which `ask` turns into a prompt; `completions`, a list, or
    `completion`. Lines with one `id`, or without an id with one prompt, belong to one problem. Optional are `answers`
    or `answer` (null: no answer) and `tokenizer`, the sha256 of `tokenizer_fingerprint`.

    Args:
        path: File of the candidates, of any kind whose rows are JSON objects.
        ask: Function that makes a prompt of a question.

    Raises:
        ConfigError: The file cannot be read.
        DataError: A line is not such an object (the message names file:line), or the file has no candidates.
    """
    problems: dict[str, Candidates] = {}
    for place, line in read_objects(path, "with prompt and completions", option="candidates"):
        _add(problems, line, place, ask)
    if not problems:
        raise DataError(f"{path}: has no candidates, needs one JSON object a line")
    for problem in problems.values():
        if problem.answers and not problem.has_answers:
            raise DataError(f"{problem.places[0]}: some candidates of {problem.name} have an answer and some have none")
    return list(problems.values())


def _add(problems: dict[str, Candidates], line: dict[str, Any], place: str, ask: Callable[[str], str]) -> None:
    asked = next((name for name in ("prompt", "question") if name in line), None)
    if asked is None or not isinstance(line[asked], str) or not line[asked]:
        raise DataError(f"{place}: {asked or 'prompt'}: missing or not a text; needs the prompt, or the question")
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
"""Names of the scores of all kinds of verifiers."""
Process = Literal["product", "minimum", "last"]


def rank(
    by: RankBy,
    *,
    scores: Sequence[float] | None = None,
    answers: Sequence[str | None] | None = None,
    weights: Sequence[float] | None = None,
) -> list[int]:
    """Returns the candidates' indices, best first.

    In a vote the candidates of one answer follow each other. Answers with equal votes are in the order of their best
    scores, then of their first candidates; candidates without an answer come last.

    Args:
        by: Rule of the order: `score`: the highest score first. `majority`: the most frequent answer first
            (self-consistency, arXiv 2203.11171). `weighted`: the answer with the largest sum of weights first.
        scores: One score for each candidate; for `majority` they only break ties, and may be left out.
        answers: Final answers of the candidates, for votes: equal texts are equal answers, None is no answer.
        weights: Weights of the candidates' votes, at least 0 each, for `weighted`; `vote_weights` makes them from
            scores.

    Raises:
        ConfigError: A sequence that `by` needs is missing.
        DataError: The sequences have different lengths.
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
    """Returns the votes for each answer: the number of candidates that give it, or the sum of their weights."""
    votes: dict[str, float] = {}
    for place, answer in enumerate(answers):
        if answer is not None:
            votes[answer] = votes.get(answer, 0.0) + (1.0 if weights is None else weights[place])
    return votes


def vote_weights(scores: Sequence[float], logarithmic: bool) -> list[float]:
    """Returns the weight of each candidate's vote.

    Args:
        scores: Scores of a verifier, at least one.
        logarithmic: Whether the scores are log-likelihoods or log-ratios in nats, which are weighted by their
            exponentials, scaled to the sum 1; otherwise they are probabilities, which are the weights themselves.
    """
    if not logarithmic:
        return [max(0.0, score) for score in scores]
    highest = max(scores)
    weights = [math.exp(score - highest) for score in scores]
    return [weight / sum(weights) for weight in weights]


def process_score(scores: Sequence[float], how: Process = "product") -> float:
    """Returns one number for a solution from the scores of its steps (Lightman et al., arXiv 2305.20050, App. F).

    Args:
        scores: One score for each step, at least one.
        how: Rule that joins the scores: `product` (the probability that all steps are right, if scores are
            probabilities), `minimum` (the weakest step), or `last`.

    Raises:
        DataError: `scores` is empty.
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


KEY = "key"
"""Field of a ranked line with the hash of the candidates, the options and the verifier that it was made from."""


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """Ranks candidate solutions, best first.

    A line of the candidates: {"prompt": TEXT or "question": TEXT, "completions": [TEXT, ...]} or {"id": NAME, "prompt":
    TEXT, "completion": TEXT}, with "answers" or "answer" if they are known.

    Args:
        verifier: Directory of a verifier, or directory or hub name of any causal language model.
        candidates: File of the candidates, such as JSONL.
        out: JSONL file for the ranking; the ranking in a file that an interrupted run left is continued. Null: standard
            output.
        by: Rule of the order: `score` of the whole solution, votes (`majority`, `weighted`), or `process`: the scores
            of its steps.
        score: Name of the verifier's score: `sum`, `mean`, `ratio` or `last`. Null: the verifier's own default.
        how: Rule that joins the scores of a solution's steps, for `process`. Null: `product`.
        task: Task that makes prompts, and finds answers and steps in completions. Null: each line of a completion is a
            step.
        reference: Present directory of the reference, for the score `ratio`. Null: the one recorded in training.
        device: Device to score on: `auto` (the first GPU, or the CPU if there is none), `cpu`, `cuda` or `cuda:N`.
        dtype: Type of the verifier's weights. Null: the type they are saved in.
    """

    verifier: str | None = None
    candidates: Annotated[Path, INPUT_ONCE]
    out: Path | None = None
    by: Literal["score", "majority", "weighted", "process"] = "score"
    score: Literal["sum", "mean", "ratio", "last"] | None = None
    how: Process | None = None
    task: str | None = None
    reference: str | None = None
    device: Device = "auto"
    dtype: Dtype | None = None


RANK = Command("rank", RankOptions)


def rank_file(options: RankOptions) -> None:
    """Ranks the candidates of a file; each problem is written to disk as soon as it is ranked.

    Raises:
        ConfigError: An option cannot be used, or candidates were made with another tokenizer than the verifier's.
        DataError: A line of the candidates is wrong.
        CheckpointError: The verifier is damaged.
    """
    if options.verifier is None and options.by != "majority":
        raise ConfigError(f"verifier: missing; --by {options.by} needs one; only --by majority works without")
    if options.how is not None and options.by != "process":
        raise ConfigError(f"how: got {options.how}, but --by {options.by} has no steps; needs --by process")
    task = None if options.task is None else load_task(options.task, ProblemOptions())
    problems = read_candidates(options.candidates, _asking(task))
    if options.by in ("majority", "weighted"):
        _find_answers(problems, task)
    verifier = None
    if options.verifier is not None:
        check_model_path(options.verifier, "verifier")
        check_weights_format(options.verifier, "verifier")
        from quietstar.verifiers.verifier import Verifier  # after everything that can be refused without torch

        verifier = Verifier(options.verifier, device=options.device, dtype=options.dtype, reference=options.reference)
        check = verifier.check_step_score if options.by == "process" else verifier.check_score
        kind: Any = check(options.score)
        options = replace(options, score=kind)
        for problem in problems:
            for tokenizer, place in problem.tokenizers.items():
                verifier.check_tokenizer(tokenizer, place)
    steps = [_steps_of(problem, task) if options.by == "process" else None for problem in problems]
    keys = [_key(problem, own, options, verifier) for problem, own in zip(problems, steps, strict=True)]
    done, out = (0, sys.stdout) if options.out is None else _continue(options.out, keys)
    try:
        for number, (problem, key) in enumerate(zip(problems, keys, strict=True), start=1):
            if number > done:
                line = {**_ranked(problem, steps[number - 1], options, verifier), KEY: key}
                with naming(options.out or "standard output"):
                    out.write(json.dumps(line, ensure_ascii=False) + "\n")
                    out.flush()
                if options.out is not None:
                    print(f"ranked {number} of {len(problems)} problems", file=sys.stderr)
    finally:
        if out is not sys.stdout:
            with suppress(OSError):  # a pipe has no disk; what a full disk does not hold was told at the write
                os.fsync(out.fileno())
            out.close()


def _ranked(
    problem: Candidates, steps: list[list[str]] | None, options: RankOptions, verifier: Verifier | None
) -> dict[str, Any]:
    """Returns one line of the result: the candidates with rank 1, 2, ... and their places among the problem's, from
    0.
    """
    scores = weights = of_steps = None
    by, how = options.by, options.score
    if verifier is not None:
        named = [f"{place}: candidate" for place in problem.places]
        if steps is not None:
            of_steps = verifier.score_steps_many([(problem.prompt, own) for own in steps], how, named)
            scores = [process_score(own, options.how or "product") for own in of_steps]
        else:
            scores = verifier.score_many([(problem.prompt, text) for text in problem.completions], how, named)
            weights = vote_weights(scores, verifier.logarithmic)
    answers = problem.answers if problem.has_answers else None
    votes = count_votes(answers or [], weights if by == "weighted" else None)
    ranked: list[dict[str, Any]] = []
    for place in rank("score" if by == "process" else by, scores=scores, answers=answers, weights=weights):
        entry: dict[str, Any] = {"rank": len(ranked) + 1, "index": place}
        if scores is not None:
            entry["score"] = scores[place]
        if of_steps is not None:
            entry["steps"] = of_steps[place]
        if answers is not None:
            answer = answers[place]
            entry |= {"answer": answer, "votes": 0.0 if answer is None else votes[answer]}
        ranked.append(entry | {"completion": problem.completions[place]})
    return {"id": problem.name, "prompt": problem.prompt, "ranked": ranked}


def _asking(task: Task | None) -> Callable[[str], str]:
    if task is None:
        return str
    return lambda question: task.prompt(Problem(id="candidate", question=question, answer=""))


def _find_answers(problems: list[Candidates], task: Task | None) -> None:
    for problem in problems:
        if not problem.has_answers:
            if task is None:
                raise ConfigError(
                    f"{problem.places[0]}: has no answers, which votes count; give them in the field answers, or the "
                    "task that finds them: --task NAME"
                )
            problem.answers = [task.extract(text) for text in problem.completions]


def _steps_of(problem: Candidates, task: Task | None) -> list[list[str]]:
    """Returns the steps of each candidate; a completion without any step is one step.

    Raises:
        DataError: The steps, joined, are not the whole completion.
    """
    found = []
    for place, text in zip(problem.places, problem.completions, strict=True):
        steps = text.splitlines(keepends=True) if task is None else task.steps(text)
        if "".join(steps) != text:
            raise DataError(f"{place}: the steps that the task finds, joined, are not the completion {text[:60]!r}")
        found.append(steps or [text])
    return found


def _key(problem: Candidates, steps: list[list[str]] | None, options: RankOptions, verifier: Verifier | None) -> str:
    made_from: list[Any] = [
        problem.name,
        problem.prompt,
        problem.completions,
        problem.answers,
        options.by,
        options.score,
    ]
    made_from.append(None if verifier is None else verifier.fingerprint)
    made_from += [] if steps is None else [options.how or "product", steps]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def _continue(path: Path, keys: list[str]) -> tuple[int, TextIO]:
    """Returns the number of problems already in a file, and the file open for appending; a half line is cut off.

    Raises:
        ConfigError: The file holds other candidates or another verifier's ranking, or cannot be written.
    """
    try:
        if path_kind(path, "out") == "other":
            return 0, path.open("w", encoding="utf-8", errors="backslashreplace")
        content = path.read_bytes() if path.exists() else b""
        lines = content.split(b"\n")[:-1]
        for number, line in enumerate(lines):
            if number >= len(keys) or _key_of(line) != keys[number]:
                raise ConfigError(
                    f"out: {path}:{number + 1} is not what these candidates, this verifier and these options give; "
                    "choose another file, or remove it"
                )
        out = path.open("r+" if content else "w", encoding="utf-8", errors="backslashreplace")
        out.truncate(sum(len(line) + 1 for line in lines))
        out.seek(0, os.SEEK_END)
    except OSError as error:
        raise ConfigError(f"out: cannot write {path} ({error.strerror})") from None
    return len(lines), out


def _key_of(line: bytes) -> str | None:
    try:
        value = parse_json(line)
    except ValueError:
        return None
    return value.get(KEY) if isinstance(value, dict) else None
