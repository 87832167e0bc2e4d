"""One set of completions: sampled as far as the store does not have them, and judged."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from quietstar.config.loops import SamplingOptions, sampling_inputs
from quietstar.errors import CheckpointError
from quietstar.outer_loop.phases import Phases, key_of
from quietstar.outer_loop.store import Place, Sample, SampleStore
from quietstar.sampling.requests import Request, Sampler, sample_seed
from quietstar.tasks.checking import Checker
from quietstar.tasks.task import Problem, Task, Verdict

MOST_WORKERS, CHECKED_AT_ONCE = 8, 2_000
"""Processes that check answers, where they are isolated, and answers between two notes of verdicts."""
TOLD = 10
"""Lines of progress while one set is sampled, at most."""
Purpose = Literal["sample", "rationalize", "evaluate", "candidates"]


@dataclass(frozen=True)
class Generator:
    """A model that completions come from.

    Args:
        path: Directory or hub name.
        sha256: Of its weights.
    """

    path: str
    sha256: str


class Completions:
    """Samples completions and has them judged, as two phases of an iteration each.

    Args:
        task: Of the problems.
        store: Where all samples go.
        phases: Of the run.
        seed: Of the run.
        timeout: Seconds that a check may take.
        make_sampler: `(path, options) -> Sampler`, called only where something is to be sampled.
        tell: Called with a line of progress.
    """

    def __init__(
        self,
        task: Task,
        store: SampleStore,
        phases: Phases,
        seed: int,
        timeout: float,
        make_sampler: Callable[[str, SamplingOptions], Sampler],
        tell: Callable[[str], None],
    ) -> None:
        self._task = task
        self._store = store
        self._phases = phases
        self._seed = seed
        self._timeout = timeout
        self._make_sampler = make_sampler
        self._tell = tell

    def of(
        self,
        iteration: int,
        purpose: Purpose,
        generator: Generator,
        problems: Sequence[Problem],
        options: SamplingOptions,
    ) -> tuple[list[Sample], dict[str, Any]]:
        """Completions of some problems, each with its verdict.

        Args:
            iteration: That asks.
            purpose: `rationalize` shows the answer as a hint.
            generator: The model.
            problems: What it is asked.
            options: How it samples.

        Returns:
            The samples, problem by problem, and what `summarise` says of them.
        """
        hinted = purpose == "rationalize"
        before = self._task.few_shot(hinted) if options.few_shot else ""
        prompts = {problem.id: before + self._task.prompt(problem, hinted) for problem in problems}
        inputs = {
            "model": generator.sha256,
            "prompts": key_of({"prompts": list(prompts.items()), "stop": list(self._task.stop)}),
            "training.seed": self._seed,
            **sampling_inputs(options),
        }

        def sample(key: str) -> dict[str, Any]:
            found = self._sample(key, iteration, purpose, generator, prompts, options)
            return {"key": key, "samples": len(found), "sha256": _hash(s.generation.text for s in found)}

        made = self._phases.run(iteration, purpose, inputs, sample)
        # Samples and verdicts whose lines have been deleted since, because they were damaged, are made again.
        samples = self._sample(made["key"], iteration, purpose, generator, prompts, options)
        if _hash(one.generation.text for one in samples) != made["sha256"]:
            raise self._changed(iteration, purpose)

        def verify(check: str) -> dict[str, Any]:
            return {"key": check, **summarise(self._verify(samples, problems, check), problems)}

        asked = {
            "samples": made["sha256"],
            "task": self._task.name,
            "answers": key_of({problem.id: problem.answer for problem in problems}),
        }
        verifying = f"verify_{purpose}"
        summary = self._phases.run(iteration, verifying, asked, verify)
        self._tell(
            f"  {summary['accuracy']:.1%} right, {summary['solved']} of {summary['problems']} problems solved, "
            f"{summary['truncated']:.0%} cut off"
        )
        judged = list(self._store.samples(made["key"]).values())
        if any(one.verdict is None for one in judged):
            self._verify(judged, problems, summary["key"])
        judged = _in_order(self._store.samples(made["key"]), problems)
        if summarise(judged, problems)["sha256"] != summary["sha256"]:
            raise self._changed(iteration, verifying)
        return judged, summary

    def _changed(self, iteration: int, phase: str) -> CheckpointError:
        manifest = self._phases.directory_of(iteration) / f"{phase}.json"
        return CheckpointError(
            f"{self._store.path}: is not what {phase} of iteration {iteration} has left there; delete {manifest}, and "
            "go on with --loop.redo"
        )

    def _sample(
        self,
        key: str,
        iteration: int,
        purpose: Purpose,
        generator: Generator,
        prompts: Mapping[str, str],
        options: SamplingOptions,
    ) -> list[Sample]:
        hinted = purpose == "rationalize"
        places = [Place(iteration, purpose, problem, index) for problem in prompts for index in range(options.samples)]
        requests = [
            Request(
                prompts[place.problem],
                sample_seed(self._seed, iteration, purpose, place.problem, place.index),
                f"problem {place.problem}",
            )
            for place in places
        ]
        done = self._store.samples(key)
        if len(done) < len(places):
            sampler = self._make_sampler(generator.path, options)
            try:
                finished = 0
                for batch in sampler.batches(requests):
                    # A batch of which a crash has kept a part is sampled again as a whole: only so is it the same.
                    missing = [i for i in batch if (places[i].problem, places[i].index) not in done]
                    if missing:
                        generations = dict(zip(batch, sampler.sample([requests[i] for i in batch]), strict=True))
                        self._store.add_samples(
                            Sample(places[i], key, requests[i].seed, hinted, generations[i]) for i in missing
                        )
                    before, finished = finished, finished + len(batch)
                    if before * TOLD // len(places) < finished * TOLD // len(places):
                        self._tell(f"  {finished} of {len(places)} completions")
            finally:
                sampler.close()
            done = self._store.samples(key)
        return [done[place.problem, place.index] for place in places]

    def _verify(self, samples: Sequence[Sample], problems: Sequence[Problem], check: str) -> list[Sample]:
        """Judges samples, and notes verdicts as they come: a check that was stopped goes on where it was. Where this
        very check has been through all of them, its manifest was deleted to have it done again.
        """
        by_id = {problem.id: problem for problem in problems}
        done = {one.place: one for one in samples if one.verdict is not None and one.check == check}
        if len(done) == len(samples):
            done = {}
        left = [one for one in samples if one.place not in done]
        with Checker(self._task, self._timeout, workers=min(MOST_WORKERS, os.cpu_count() or 1)) as checker:
            for first in range(0, len(left), CHECKED_AT_ONCE):
                part = left[first : first + CHECKED_AT_ONCE]
                verdicts = checker.check([(by_id[one.place.problem], one.generation.text) for one in part])
                judged = [
                    replace(one, verdict=verdict, check=check) for one, verdict in zip(part, verdicts, strict=True)
                ]
                self._store.add_verdicts(new for old, new in zip(part, judged, strict=True) if old != new)
                done |= {one.place: one for one in judged}
        return [done[one.place] for one in samples]


def summarise(samples: Sequence[Sample], problems: Sequence[Problem]) -> dict[str, Any]:
    """What is known of judged samples, plain JSON values.

    Returns:
        `problems`, `samples`, `correct` (samples), `solved` (problems with a right sample), `accuracy` (mean over
        problems of the share of right samples), `by_group` (the same by group), `truncated` (share of samples that
        reached the limit of tokens), `unanswered` (share without an answer), `tokens` (mean), `failures` (checks that
        did not come to an end), `sha256` of texts and verdicts.
    """
    right: dict[str, list[bool]] = {problem.id: [] for problem in problems}
    for sample in samples:
        right[sample.place.problem].append(verdict_of(sample).correct)
    share = {name: sum(found) / len(found) if found else 0.0 for name, found in right.items()}
    groups: dict[str, list[float]] = {}
    for problem in problems:
        groups.setdefault(problem.group, []).append(share[problem.id])
    count = max(1, len(samples))
    return {
        "problems": len(problems),
        "samples": len(samples),
        "correct": sum(map(sum, right.values())),
        "solved": sum(map(any, right.values())),
        "accuracy": sum(share.values()) / max(1, len(share)),
        "by_group": {group: sum(values) / len(values) for group, values in sorted(groups.items())},
        "truncated": sum(one.generation.finish_reason == "length" for one in samples) / count,
        "unanswered": sum(verdict_of(one).answer is None for one in samples) / count,
        "tokens": sum(one.generation.tokens for one in samples) / count,
        "failures": sum(verdict_of(one).failure is not None for one in samples),
        "sha256": _hash(
            f"{one.generation.text!r} {verdict_of(one).answer} {verdict_of(one).correct}" for one in samples
        ),
    }


def verdict_of(sample: Sample) -> Verdict:
    """The verdict of a sample that has been judged."""
    assert sample.verdict is not None, sample.place
    return sample.verdict


def _in_order(found: Mapping[tuple[str, int], Sample], problems: Sequence[Problem]) -> list[Sample]:
    order = {problem.id: place for place, problem in enumerate(problems)}
    return sorted(found.values(), key=lambda one: (order[one.place.problem], one.place.index))


def _hash(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(repr(text).encode())
    return digest.hexdigest()
