"""Completions of one iteration and purpose: sampled where the store does not have them, and judged."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from quietstar.config.sampling import SamplingOptions, sampling_inputs
from quietstar.errors import CheckpointError
from quietstar.outer_loop.phases import Phases, key_of
from quietstar.outer_loop.store import Place, Sample, SampleStore
from quietstar.sampling.requests import Request, Sampler, sample_seed
from quietstar.tasks.checking import Checker
from quietstar.tasks.task import Problem, Task, Verdict

MOST_WORKERS, CHECKED_AT_ONCE = 8, 2_000
"""Largest number of processes that check answers of isolated tasks, and number of answers after which verdicts are
stored."""

TOLD = 10
"""Largest number of progress lines while one set is sampled."""

Purpose = Literal["sample", "rationalize", "evaluate", "candidates"]


@dataclass(frozen=True)
class Generator:
    """A model that samples completions.

    Args:
        path: Directory or hub name of the model.
        sha256: Hash of the model's weights, from `weights_sha256`.
    """

    path: str
    sha256: str


class Completions:
    """Samples completions and judges them, as two phases of an iteration.

    Args:
        task: Task that the problems belong to.
        store: Store of all samples of the run.
        phases: Phases of the run.
        seed: Seed of the run, `training.seed`.
        timeout: Time limit of one check in seconds.
        make_sampler: Function `(generator, options) -> Sampler` that checks the generator's weights; called only where
            something has to be sampled.
        tell: Function called with each line of progress.
    """

    def __init__(
        self,
        task: Task,
        store: SampleStore,
        phases: Phases,
        seed: int,
        timeout: float,
        make_sampler: Callable[[Generator, SamplingOptions], Sampler],
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
        """Returns completions of some problems, each with its verdict.

        Args:
            iteration: Number of the iteration that asks.
            purpose: Purpose of the completions; `rationalize` shows the answer as a hint.
            generator: Model that samples the completions.
            problems: Problems that it is asked.
            options: Options that it samples with.

        Returns:
            The samples in the order of the problems, and their summary from `summarise`.
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
        # samples and verdicts are made again where damaged lines have been deleted since
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
            kept = {index for index, place in enumerate(places) if (place.problem, place.index) in done}
            sampler = self._make_sampler(generator, options)
            try:
                finished = len(kept)
                for found in sampler.complete(requests, kept):
                    self._store.add_samples(
                        Sample(places[i], key, requests[i].seed, hinted, completion) for i, completion in found.items()
                    )
                    before, finished = finished, finished + len(found)
                    if before * TOLD // len(places) < finished * TOLD // len(places):
                        self._tell(f"  {finished} of {len(places)} completions")
            finally:
                sampler.close()
            done = self._store.samples(key)
        return [done[place.problem, place.index] for place in places]

    def _verify(self, samples: Sequence[Sample], problems: Sequence[Problem], check: str) -> list[Sample]:
        """Judges samples, and stores verdicts as they come, so that a check that was stopped continues.

        Where this same check has judged all samples already, its manifest was deleted to have it done again.
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
    """Returns a summary of judged samples as plain JSON values.

    Returns:
        `problems`, `samples`, `correct` (number of right samples), `solved` (number of problems with a right sample),
        `accuracy` (mean over problems of the share of right samples), `by_group` (accuracy by group), `truncated`
        (share of samples that reached the limit of tokens), `unanswered` (share without an answer), `tokens` (mean
        number), `failures` (number of checks that did not finish), `sha256` of texts and verdicts.
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
    """Returns the verdict of a sample that has been judged."""
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
