"""What `quietstar.rank` does: candidate solutions in order, by a verifier or by votes."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from quietstar.config.checkpoint import Dtype
from quietstar.config.command_line import Command
from quietstar.config.loops import ProblemOptions
from quietstar.config.options import Device
from quietstar.config.values import check_model_path
from quietstar.errors import ConfigError, DataError
from quietstar.tasks import load_task
from quietstar.tasks.task import Problem, Task
from quietstar.verifiers.candidates import (
    Candidates,
    Process,
    count_votes,
    process_score,
    rank,
    read_candidates,
    vote_weights,
)

if TYPE_CHECKING:
    from quietstar.verifiers.verifier import Verifier

KEY = "key"
"""Field of a ranked line: hash of what it was made from."""


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """Ranks candidate solutions, best first.

    A line of the candidates: {"prompt": TEXT or "question": TEXT, "completions": [TEXT, ...]} or {"id": NAME, "prompt":
    TEXT, "completion": TEXT}, with "answers" or "answer" where they are known.

    Args:
        verifier: Directory of a verifier, or any causal language model.
        candidates: JSONL file of the candidates.
        out: JSONL file of the ranking; one that a killed run has begun is gone on with. Null: standard output.
        by: What decides: `score` of the whole, votes (`majority`, `weighted`), or `process`: the scores of its steps.
        score: What the verifier scores by. Null: what suits it.
        how: What `process` makes of the scores of the steps. Null: `product`.
        task: Task that makes prompts, and finds answers and steps in completions. Null: a line is a step.
        reference: Directory where the reference of the score `ratio` lies now.
        device: Device of the verifier.
        dtype: Type of the weights. Null: as saved.
    """

    verifier: str | None = None
    candidates: Path
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
    """Ranks the candidates of a file; each problem is on the disk as soon as it is ranked.

    Raises:
        ConfigError: An option cannot be used, or candidates are of another tokenizer than the verifier's.
        DataError: A line of the candidates is wrong.
        CheckpointError: The verifier is damaged.
    """
    if options.verifier is None and options.by != "majority":
        raise ConfigError(f"verifier: missing; --by {options.by} needs one, only --by majority does without")
    if options.how is not None and options.by != "process":
        raise ConfigError(f"how: got {options.how}, but --by {options.by} has no steps; needs --by process")
    task = None if options.task is None else load_task(options.task, ProblemOptions())
    problems = read_candidates(options.candidates, _asking(task))
    if options.by in ("majority", "weighted"):
        _find_answers(problems, task)
    verifier = None
    if options.verifier is not None:
        check_model_path(options.verifier, "verifier")
        from quietstar.verifiers.verifier import Verifier  # after all that can be refused before torch comes

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
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
                out.flush()
                if options.out is not None:
                    print(f"ranked {number} of {len(problems)} problems", file=sys.stderr)
    finally:
        if out is not sys.stdout:
            os.fsync(out.fileno())
            out.close()


def _ranked(
    problem: Candidates, steps: list[list[str]] | None, options: RankOptions, verifier: Verifier | None
) -> dict[str, Any]:
    """One line of the result: the candidates with rank 1, 2, ... and their places among the problem's, from 0."""
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
    """The steps of each candidate; a completion without any is one step.

    Raises:
        DataError: They are not the whole completion.
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
    """How many problems a file has already, and the file, open behind them; what a crash has left half is cut off.

    Raises:
        ConfigError: It is of other candidates or another verifier, or cannot be written.
    """
    try:
        content = path.read_bytes() if path.exists() else b""
        lines = content.split(b"\n")[:-1]
        for number, line in enumerate(lines):
            if number >= len(keys) or _key_of(line) != keys[number]:
                raise ConfigError(
                    f"out: {path}:{number + 1} is not what these candidates, this verifier and these options give; "
                    "choose another file, or remove it"
                )
        out = path.open("r+" if content else "w", encoding="utf-8")
        out.truncate(sum(len(line) + 1 for line in lines))
        out.seek(0, os.SEEK_END)
    except OSError as error:
        raise ConfigError(f"out: cannot write {path} ({error.strerror})") from None
    return len(lines), out


def _key_of(line: bytes) -> str | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value.get(KEY) if isinstance(value, dict) else None
