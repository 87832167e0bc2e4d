"""The examples that an iteration trains on: which completions are kept, and with which prompts."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quietstar.config.loops import LoopOptions
from quietstar.config.parsing import check_type, parse_json
from quietstar.errors import CheckpointError
from quietstar.outer_loop.store import Sample
from quietstar.runs.files import write_whole
from quietstar.tasks.task import Problem, Task


@dataclass(frozen=True)
class Kept:
    """A training example.

    Args:
        problem: Id of the example's problem; empty for a demonstration without one.
        prompt: Prompt without solved examples and without a hint.
        completion: Completion up to its answer.
        source: Source of the completion: `sample`, `rationalize`, or `demonstration`.
        iteration: Number of the iteration that made the completion; 0 for demonstrations.
        index: Number of the sample among those of its problem, from 0.
        right_inside: Whether every step is right; None where the task cannot tell.
    """

    problem: str
    prompt: str
    completion: str
    source: str
    iteration: int = 0
    index: int = 0
    right_inside: bool | None = None


def demonstrations(task: Task) -> list[Kept]:
    """Returns the human-written examples of a task."""
    return [Kept(one.problem, one.prompt, one.completion, "demonstration") for one in task.demonstrations()]


def right_completions(
    task: Task, problems: Mapping[str, Problem], samples: Iterable[Sample], options: LoopOptions
) -> tuple[list[Kept], dict[str, int]]:
    """Returns the samples with the right answer, in the order of the problems, with prompts without hints.

    Args:
        task: Task that the problems belong to.
        problems: Problems of the samples, by id.
        samples: Samples with their verdicts.
        options: Options of the loop; `drop_hint_quotes` is used.

    Returns:
        The kept examples, and `quoted_hint`: the number of rationalised completions that mention the hint.
    """
    kept, quoted = [], 0
    order = {name: place for place, name in enumerate(problems)}
    for sample in sorted(samples, key=lambda one: (one.hinted, order[one.place.problem], one.place.index)):
        if sample.verdict is None or not sample.verdict.correct:
            continue
        problem, text = problems[sample.place.problem], task.accepted(sample.generation.text)
        if sample.hinted and task.quotes_hint(problem, text):
            quoted += 1
            if options.drop_hint_quotes:
                continue
        kept.append(
            Kept(
                problem.id,
                task.prompt(problem),
                text,
                sample.place.purpose,
                sample.place.iteration,
                sample.place.index,
                task.right_inside(problem, text),
            )
        )
    return kept, {"quoted_hint": quoted}


def without_duplicates(task: Task, kept: Sequence[Kept], options: LoopOptions, seed: int) -> list[Kept]:
    """Applies `deduplicate` and `max_per_problem`; all demonstrations stay, and count as seen.

    Args:
        task: Task that says which solutions are the same.
        kept: Examples in order; of duplicates the first stays.
        options: Options of the loop.
        seed: Seed of the choice where a problem has too many examples.
    """
    unique: list[Kept] = []
    seen: set[tuple[str, str]] = set()
    for one in kept:
        key = task.solution_key(one.completion) if options.deduplicate == "solution" else one.completion
        name = (one.problem or one.prompt, key)
        if options.deduplicate != "none" and name in seen and one.source != "demonstration":
            continue
        seen.add(name)
        unique.append(one)
    if options.max_per_problem is None:
        return unique
    shuffled = list(range(len(unique)))
    random.Random(seed).shuffle(shuffled)
    count: Counter[str] = Counter()
    chosen = set()
    for place in shuffled:
        one = unique[place]
        if one.source == "demonstration" or count[one.problem] < options.max_per_problem:
            chosen.add(place)
            count[one.problem] += one.source != "demonstration"
    return [one for place, one in enumerate(unique) if place in chosen]


def describe(kept: Sequence[Kept]) -> dict[str, Any]:
    """Counts examples: `kept` of all, `problems` with at least one, and `hinted` ones.

    It also has, for each source, the share of examples in which every step is right, among those that the task can
    judge.
    """
    counts: dict[str, Any] = {
        "kept": len(kept),
        "problems": len({one.problem for one in kept if one.problem}),
        "hinted": sum(one.source == "rationalize" for one in kept),
    }
    for source in ("sample", "rationalize"):
        judged = [one.right_inside for one in kept if one.source == source and one.right_inside is not None]
        if judged:
            counts[f"right_inside_{source}"] = sum(judged) / len(judged)
    return counts


def write_kept(file: Path, kept: Iterable[Kept]) -> None:
    """Writes examples as JSON lines; the file is never incomplete."""
    write_whole(file, "".join(json.dumps(asdict(one)) + "\n" for one in kept))


def read_kept(file: Path) -> list[Kept]:
    """Reads the examples that `write_kept` has written.

    Raises:
        CheckpointError: The file is missing or damaged; the message names file and line.
    """
    kept = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); delete build.json beside it") from None
    for number, line in enumerate(lines, start=1):
        try:
            values = parse_json(line, surrogates=True)
            check_type(values, Kept, "example")
            kept.append(Kept(**values))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{file}:{number}: damaged ({error}); delete build.json beside it") from None
    return kept
