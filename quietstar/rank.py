"""`python -m quietstar.rank`: put candidate solutions in order, by a verifier or by votes."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, get_args

from quietstar.config.command_line import run_command
from quietstar.config.loops import ProblemOptions
from quietstar.config.values import DTYPES, check_device, check_model_path
from quietstar.errors import ConfigError, DataError
from quietstar.tasks import load_task
from quietstar.tasks.task import Problem, Task
from quietstar.verifiers.candidates import (
    Candidates,
    Process,
    Score,
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = parser().parse_args(argv)
    return run_command(lambda: rank_file(arguments))


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    p = argparse.ArgumentParser(
        prog="python -m quietstar.rank",
        description="Ranks candidate solutions, best first. A line of the candidates: "
        '{"prompt": TEXT or "question": TEXT, "completions": [TEXT, ...]} or '
        '{"id": NAME, "prompt": TEXT, "completion": TEXT}, with "answers" or "answer" where they are known.',
    )
    p.add_argument("--verifier", metavar="DIR", help="a verifier's directory, or any causal language model")
    p.add_argument("--candidates", metavar="FILE", required=True, help="JSONL file")
    p.add_argument("--out", metavar="FILE", help="JSONL file; one that a killed run has begun is gone on with")
    p.add_argument(
        "--by",
        choices=("score", "majority", "weighted", "process"),
        default="score",
        help="score of the whole, votes, or process: the scores of its steps",
    )
    p.add_argument("--score", choices=get_args(Score), help="what the verifier scores by")
    p.add_argument("--how", choices=get_args(Process), help="what --by process makes of the steps; default: product")
    p.add_argument(
        "--task",
        metavar="NAME",
        help="task that makes prompts, and finds answers and steps in completions; without: a line is a step",
    )
    p.add_argument("--reference", metavar="DIR", help="where the reference of --score ratio lies now")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as saved")
    return p


def rank_file(arguments: argparse.Namespace) -> None:
    """Ranks the candidates of a file; each problem is on the disk as soon as it is ranked.

    Raises:
        ConfigError: An argument cannot be used, or candidates are of another tokenizer than the verifier's.
        DataError: A line of the candidates is wrong.
        CheckpointError: The verifier is damaged.
    """
    if arguments.verifier is None and arguments.by != "majority":
        raise ConfigError(f"verifier: missing; --by {arguments.by} needs one, only --by majority does without")
    if arguments.how is not None and arguments.by != "process":
        raise ConfigError(f"how: got {arguments.how}, but --by {arguments.by} has no steps; needs --by process")
    check_device(arguments.device)
    task = None if arguments.task is None else load_task(arguments.task, ProblemOptions())
    problems = read_candidates(Path(arguments.candidates), _asking(task))
    if arguments.by in ("majority", "weighted"):
        _find_answers(problems, task)
    verifier = None
    if arguments.verifier is not None:
        check_model_path(arguments.verifier, "verifier")
        from quietstar.verifiers.verifier import Verifier  # after all that can be refused before torch comes

        verifier = Verifier(
            arguments.verifier, device=arguments.device, dtype=arguments.dtype, reference=arguments.reference
        )
        check = verifier.check_step_score if arguments.by == "process" else verifier.check_score
        arguments.score = check(arguments.score)
        for problem in problems:
            for tokenizer, place in problem.tokenizers.items():
                verifier.check_tokenizer(tokenizer, place)
    steps = [_steps_of(problem, task) if arguments.by == "process" else None for problem in problems]
    keys = [_key(problem, own, arguments, verifier) for problem, own in zip(problems, steps, strict=True)]
    done, out = (0, sys.stdout) if arguments.out is None else _continue(Path(arguments.out), keys)
    try:
        for number, (problem, key) in enumerate(zip(problems, keys, strict=True), start=1):
            if number > done:
                line = {**_ranked(problem, steps[number - 1], arguments, verifier), KEY: key}
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
                out.flush()
                if arguments.out is not None:
                    print(f"ranked {number} of {len(problems)} problems", file=sys.stderr)
    finally:
        if out is not sys.stdout:
            os.fsync(out.fileno())
            out.close()


def _ranked(
    problem: Candidates, steps: list[list[str]] | None, arguments: argparse.Namespace, verifier: Verifier | None
) -> dict[str, Any]:
    """One line of the result: the candidates with rank 1, 2, ... and their places among the problem's, from 0."""
    scores = weights = of_steps = None
    by, how = arguments.by, arguments.score
    if verifier is not None:
        named = [f"{place}: candidate" for place in problem.places]
        if steps is not None:
            of_steps = verifier.score_steps_many([(problem.prompt, own) for own in steps], how, named)
            scores = [process_score(own, arguments.how or "product") for own in of_steps]
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


def _key(
    problem: Candidates, steps: list[list[str]] | None, arguments: argparse.Namespace, verifier: Verifier | None
) -> str:
    made_from = [problem.name, problem.prompt, problem.completions, problem.answers, arguments.by, arguments.score]
    made_from.append(None if verifier is None else verifier.fingerprint)
    made_from += [] if steps is None else [arguments.how or "product", steps]
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


if __name__ == "__main__":
    sys.exit(main())
