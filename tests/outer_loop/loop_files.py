"""Directories of STaR and V-STaR runs with made-up numbers, in the files that a run writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from quietstar.config.command_line import to_yaml
from quietstar.config.loops import OuterLoopConfig
from quietstar.outer_loop.store import Place, Sample, SampleStore
from quietstar.outer_loop.training_set import Kept, write_kept
from quietstar.runs.files import KEPT
from quietstar.sampling.requests import Completion
from quietstar.statistics.candidate_table import measure_candidates
from quietstar.statistics.candidates import Candidates
from quietstar.statistics.iterations import Distinct, Growth
from quietstar.statistics.ranking import StepCounts
from quietstar.tasks.task import Verdict
from tests.reporting.run_files import ENVIRONMENT, HOSTILE, write_lines

GROUPS = tuple(f"{count} digit{'s' if count > 1 else ''}" for count in (1, 2, 3, 10))
VERIFIER, SFT = "verifier (sum of log-likelihoods)", "SFT generator's likelihood"
WARNING = "iteration 2: 12% of the completions (sampled) reached sampling.max_new_tokens"


def judged(accuracies: Sequence[float], groups: Sequence[str], samples: int = 1) -> dict[str, Any]:
    """What is known of samples of 100 problems in each group."""
    problems, mean = 100 * len(groups), float(np.mean(accuracies))
    return {
        "problems": problems,
        "samples": problems * samples,
        "correct": round(problems * samples * mean),
        "solved": round(problems * min(1.0, mean * (1 + 0.2 * (samples > 1)))),
        "accuracy": mean,
        "by_group": dict(zip(groups, accuracies, strict=True)),
        "truncated": 0.01,
        "unanswered": 0.02,
        "tokens": 30.0,
        "failures": 0,
        "sha256": "0",
    }


def iteration(number: int, rationalize: bool, groups: Sequence[str], samples: int = 1) -> dict[str, Any]:
    """A row of the summary of a run that learns one group after the other, or with rationalisation all together."""
    reach = [number / 3 if rationalize else number - place for place in range(len(groups))]
    now = [float(np.clip(0.1 + 0.5 * value, 0, 0.99)) for value in reach]
    before = [float(np.clip(value - 0.2, 0, 1)) for value in now]
    mean = float(np.mean(now))
    row: dict[str, Any] = {"iteration": number}
    if number:
        sampled = judged(before, groups, samples)
        row["sampled"] = sampled
        row["built"] = {"new": 90, "quoted_hint": 0, "kept": sampled["solved"], "problems": 80, "hinted": 0}
        row["built"] |= {"right_inside_sample": 0.9, "sha256": "0"}
        if rationalize:
            row["rationalized"] = judged([0.3] * len(groups), groups)
            row["built"] |= {"kept": sampled["solved"] + 40, "hinted": 40, "right_inside_rationalize": 0.25}
        row["trained"] = {"steps": 40 + 8 * number, "rows": 50, "base_sha256": "0", "model_sha256": "1"}
        row["distinct"] = asdict(Distinct(problems=80, mean=1.5, most=4))
        row["step_counts"] = asdict(
            StepCounts(80, model=3.2, human=3.0, equal=0.8, fewer=0.05, pearson=0.53, spearman=None)
        )
        row |= asdict(Growth(newly_solved=30, lost=4, kept=50, ever=100 + 30 * number))
    row["held_out"] = {**judged(now, groups), "low": max(0.0, mean - 0.03), "high": min(1.0, mean + 0.02)}
    return row


def candidates(problems: int = 40, count: int = 16) -> dict[str, Any]:
    """Candidates whose verifier knows the right ones far better than the generator does."""
    random = np.random.default_rng(0)
    found = []
    for place in range(problems):
        right = random.random(count) < random.beta(1, 2)
        answers = ["7" if one else str(random.integers(3)) for one in right]
        scores = {
            VERIFIER: (2.0 * right + random.standard_normal(count)).tolist(),
            SFT: (0.2 * right + random.standard_normal(count)).tolist(),
        }
        found.append(Candidates(str(place), answers, right.tolist(), scores))
    table = measure_candidates(found, [1, 2, 4, 8, 16], compare=VERIFIER, logarithmic=[SFT], subsets=20, resamples=200)
    return {**table.to_json(), "compared": VERIFIER}


def samples_of(number: int, purpose: Any, completions: Sequence[tuple[str, str, str | None, bool]]) -> list[Sample]:
    """Judged samples: (problem, text, answer, correct) of each."""
    return [
        Sample(
            Place(number, purpose, problem, 0),
            f"{purpose}-{number}",
            1,
            purpose == "rationalize",
            Completion(text, -1.0, 12, "stop"),
            Verdict(answer, correct),
        )
        for problem, text, answer, correct in completions
    ]


def write_loop_run(
    directory: Path,
    iterations: int = 3,
    rationalize: bool = True,
    groups: Sequence[str] = GROUPS,
    samples: int = 1,
    choosing: dict[str, Any] | None = None,
) -> Path:
    """Everything that a run leaves behind; one of its completions is hostile."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [iteration(number, rationalize, groups, samples) for number in range(iterations + 1)]
    summary: dict[str, Any] = {"task": "addition", "iterations": rows, "warnings": [WARNING]}
    if choosing is not None:
        summary["candidates"] = choosing
    (directory / "summary.json").write_text(json.dumps(summary))
    config = OuterLoopConfig(preset="plain", output_dir=str(directory))
    config.loop.rationalize, config.loop.iterations = rationalize, iterations
    (directory / "config.yaml").write_text(to_yaml(config))
    (directory / "environment.json").write_text(json.dumps([ENVIRONMENT]))
    events = [(name, f"{seconds} s") for name, seconds in (("sample finished", 61.5), ("train finished", 30.0))]
    write_lines(
        directory / "events.jsonl",
        [{"time": 1.0, "step": 1, "event": name, "message": text} for name, text in (("started", "addition"), *events)],
    )
    with SampleStore(directory, print) as store:
        if iterations:
            _write_completions(directory / f"iteration-{iterations:02d}", store, iterations, rationalize)
    return directory


def _write_completions(place: Path, store: SampleStore, number: int, rationalize: bool) -> None:
    place.mkdir()
    sampled = [("1+1", "1+1=2;>2.", "2", True), ("2+2", HOSTILE, None, False), ("3+3", "3+3=5;>6.", "6", True)]
    made = samples_of(number - 1, "sample", [("9+9", "of an earlier iteration", "18", True)])
    made += samples_of(number, "sample", sampled)
    kept = [("1+1", "1+1=2;>2.", "sample", True), ("3+3", "3+3=5;>6.", "sample", False)]
    if rationalize:
        made += samples_of(number, "rationalize", [("2+2", "2+2=4;>4.", "4", True)])
        kept.append(("2+2", "2+2=4;>4.", "rationalize", True))
    store.add_samples(made)
    store.add_verdicts(made)
    for purpose in ("sample", "rationalize")[: 1 + rationalize]:
        (place / f"{purpose}.json").write_text(json.dumps({"outputs": {"key": f"{purpose}-{number}"}}))
    write_kept(
        place / KEPT,
        [Kept(name, f"What is {name}?", text, source, number, 0, inside) for name, text, source, inside in kept],
    )
