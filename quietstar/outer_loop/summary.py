"""The summary of a run: a row for each iteration, and warnings, made from manifests and the sample store alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from quietstar.outer_loop.sampled import verdict_of
from quietstar.outer_loop.star import OuterLoop
from quietstar.outer_loop.store import Sample
from quietstar.outer_loop.training_set import Kept, read_kept
from quietstar.runs.files import KEPT
from quietstar.statistics.intervals import bootstrap_interval
from quietstar.statistics.iterations import coverage_falls, distinct_solutions, growth, held_out_falls
from quietstar.statistics.ranking import compare_step_counts


def summarise_run(loop: OuterLoop) -> dict[str, Any]:
    """Returns everything that a report shows, as plain JSON values.

    Args:
        loop: Outer loop of which some or all iterations are finished.

    Returns:
        The fields `task`, `iterations` (one `_row` each) and `warnings`.
    """
    done = [i for i in range(loop.config.loop.iterations + 1) if i == 0 or loop.phases.outputs(i, "train")]
    rows = [_row(loop, iteration) for iteration in done]
    sampled = [_by_problem(loop.samples(iteration, "sample")) for iteration in done[1:]]
    drawn = set.intersection(*map(set, sampled)) if sampled else set()  # each iteration may draw others
    solved = [{name for name in drawn if any(found[name])} for found in sampled]
    for row, change in zip(rows[1:], growth(solved), strict=True):
        row |= asdict(change)
    return {"task": loop.task.name, "iterations": rows, "warnings": _warnings(loop, done, rows)}


def _row(loop: OuterLoop, iteration: int) -> dict[str, Any]:
    """Returns the results of one iteration.

    `sampled` and `rationalized`: summaries of these samples. `built`: completions that were kept. `trained`: steps and
    hashes. `held_out`: greedy accuracy, `low` and `high` of its interval, and `by_group`. `distinct`: number of
    different right solutions per problem. `step_counts`: numbers of steps compared with human solutions.
    """
    row: dict[str, Any] = {"iteration": iteration}
    for name, phase in (
        ("sampled", "verify_sample"),
        ("rationalized", "verify_rationalize"),
        ("built", "build"),
        ("trained", "train"),
    ):
        if (outputs := loop.phases.outputs(iteration, phase)) is not None:
            row[name] = outputs
    if (outputs := loop.phases.outputs(iteration, "verify_evaluate")) is not None:
        interval = bootstrap_interval(
            _shares(loop, loop.samples(iteration, "evaluate")), loop.config.evaluation.resamples
        )
        row["held_out"] = {**outputs, "low": interval.low, "high": interval.high}
    if iteration and "built" in row:
        kept = read_kept(loop.phases.directory_of(iteration) / KEPT)
        own = [one for one in kept if one.iteration == iteration]
        keys: dict[str, list[str]] = {}
        for one in own:
            keys.setdefault(one.problem, []).append(loop.task.solution_key(one.completion))
        row["distinct"] = asdict(distinct_solutions(keys))
        row["step_counts"] = _step_counts(loop, own)
    return row


def _step_counts(loop: OuterLoop, kept: Sequence[Kept]) -> dict[str, Any] | None:
    human = {problem.id: loop.task.solution(problem) for problem in loop.train_problems}
    pairs = [
        (len(loop.task.steps(one.completion)), len(loop.task.steps(written)))
        for one in kept
        if (written := human.get(one.problem)) is not None
    ]
    return asdict(compare_step_counts(*zip(*pairs, strict=True))) if len(pairs) > 1 else None


def _shares(loop: OuterLoop, samples: Sequence[Sample]) -> list[float]:
    """Returns the share of right samples for each held-out problem, in the order of the problems."""
    right = _by_problem(samples)
    return [sum(right[problem.id]) / len(right[problem.id]) for problem in loop.test_problems]


def _warnings(loop: OuterLoop, done: Sequence[int], rows: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    # an iteration samples from the model of the iteration before
    sampled = [row for row in rows[1:] if "sampled" in row]
    if sampled and all("held_out" in row for row in rows):
        falls = held_out_falls(
            [row["sampled"]["accuracy"] for row in sampled],
            [_shares(loop, loop.samples(row["iteration"] - 1, "evaluate")) for row in sampled],
            resamples=loop.config.evaluation.resamples,
        )
        found += [fall.message for fall in falls]
    found += _coverage(loop, [row["iteration"] for row in sampled])
    for iteration, row in zip(done, rows, strict=True):
        for name in ("sampled", "rationalized", "held_out"):
            part = row.get(name, {})
            if part.get("truncated", 0.0) > TRUNCATED:
                found.append(
                    f"iteration {iteration}: {part['truncated']:.0%} of the completions ({name.replace('_', ' ')}) "
                    "reached sampling.max_new_tokens"
                )
            if part.get("failures"):
                found.append(f"iteration {iteration}: {part['failures']} answer checks did not finish")
    return found


def _coverage(loop: OuterLoop, iterations: Sequence[int]) -> list[str]:
    """Warns of fewer problems with any right sample while single samples improve, on problems that all iterations drew.

    Models are counted from 0, the model that the first iteration samples from.
    """
    k = loop.config.sampling.samples
    if k < 2 or len(iterations) < 2:
        return []
    right = [_by_problem(loop.samples(iteration, "sample")) for iteration in iterations]
    common = sorted(set.intersection(*map(set, right)))
    if not common:
        return []
    once = [[sum(found[name]) / len(found[name]) for name in common] for found in right]
    ever = [[float(any(found[name])) for name in common] for found in right]
    falls = coverage_falls(once, ever, k, resamples=loop.config.evaluation.resamples)
    return [fall.message for fall in falls]


def _by_problem(samples: Sequence[Sample]) -> dict[str, list[bool]]:
    found: dict[str, list[bool]] = {}
    for sample in samples:
        found.setdefault(sample.place.problem, []).append(verdict_of(sample).correct)
    return found


TRUNCATED = 0.1
"""Share of truncated completions above which there is a warning."""
