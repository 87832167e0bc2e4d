"""STaR's embedded default over seeds, in two regimes: where rationalisation helps, and where it does not.

    python benchmarks/star.py

Every run is `python -m quietstar.star` with the options shown: one base model for each seed, and three arms from it.
Writes star.md, star.csv and star.svg to `--results`; what is finished is kept in `--output`, and the same command goes
on.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this file's folder is there

from benchmarks.environment import ROOT, markdown_table
from benchmarks.script import Benchmark
from quietstar.reporting.charts import Plate, figure, keys_of, line_chart
from quietstar.reporting.scales import linear_scale, mean_curve
from quietstar.statistics.intervals import estimate

REGIMES: dict[str, dict[str, str]] = {
    "default": {},
    "copied hints": {
        "problems.copied": "1.0",
        "problems.solved": "10",
        "characters.steps": "700",
        "loop.start_steps": "500",
        "loop.added_steps": "100",
        "loop.iterations": "2",
    },
}
QUICK = {
    "problems.digits": "1",
    "problems.limit": "8",
    "problems.test_limit": "8",
    "characters.layers": "1",
    "characters.hidden_size": "32",
    "characters.steps": "150",
    "characters.learning_rate": "1e-2",
    "loop.iterations": "1",
    "loop.start_steps": "4",
    "loop.added_steps": "1",
}
ARMS = {"with-rationalisation": "with", "without-rationalisation": "without", "answers-alone": "answers alone"}


@dataclass(frozen=True)
class Run:
    """One seed of one regime: what its arms' `summary.json` hold, and how long the command took."""

    seed: int
    arms: Mapping[str, Any]
    seconds: float


def command_of(regime: str, seed: int, out: Path, options: argparse.Namespace) -> list[str]:
    seeds = {"training.seed": str(seed), "problems.seed": str(seed)}
    settings = {**REGIMES[regime], **(QUICK if options.quick else {}), **seeds, "output_dir": str(out)}
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    return [sys.executable, "-m", "quietstar.star", *words, *options.extra]


def run(regime: str, seed: int, options: argparse.Namespace) -> Run:
    out = options.output / regime.replace(" ", "-") / f"seed-{seed}"
    words = command_of(regime, seed, out, options)
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    if not (out / "comparison.json").exists():
        print("==", " ".join(words[1:]), flush=True)
        out.mkdir(parents=True, exist_ok=True)
        with (out / "log.txt").open("a") as log:
            subprocess.run(words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
    arms = {arm: json.loads((out / arm / "summary.json").read_text()) for arm in ARMS}
    return Run(seed, arms, sum(_seconds(file) for file in out.rglob("events.jsonl")))


def _seconds(events: Path) -> float:
    """Time that the phases of a run took, as they noted it."""
    found = 0.0
    for line in events.read_text().splitlines():
        event = json.loads(line)
        if event["event"].endswith(" finished") and event["message"].endswith(" s"):
            found += float(event["message"].removesuffix(" s"))
    return found


def accuracies(found: Run, arm: str) -> list[float]:
    """Held-out accuracy in percent, before the loop and after each iteration."""
    return [100 * row["held_out"]["accuracy"] for row in found.arms[arm]["iterations"]]


def right_inside(found: Run, arm: str, source: str) -> list[float | None]:
    rows = [row.get("built", {}).get(f"right_inside_{source}") for row in found.arms[arm]["iterations"]]
    return [None if share is None else 100 * share for share in rows]


def shown(values: Sequence[float]) -> str:
    """Mean, standard error and interval of percentages."""
    found = estimate(values)
    if found.standard_error is None or found.low is None or found.high is None:
        return f"{found.mean:.1f}"
    return f"{found.mean:.1f} ± {found.standard_error:.1f} [{found.low:.1f}, {found.high:.1f}]"


def markdown(measured: Mapping[str, list[Run]]) -> str:
    parts = [
        "Greedy accuracy in percent on held-out sums of 1 to 5 digits (of one digit there are no others): mean over "
        "seeds ± standard error [95 % interval by Student's t], before the loop (0) and after each iteration. "
        "`right inside`: the share of the examples kept in an iteration whose every digit and carry is right.\n"
    ]
    for regime, runs in measured.items():
        flags = " ".join(f"--{key} {value}" for key, value in REGIMES[regime].items()) or "no options"
        seconds = max(found.seconds for found in runs)
        parts.append(f"## {regime.capitalize()}: {flags}, {len(runs)} seeds, at most {seconds:.0f} s a run\n")
        length = max(len(accuracies(found, arm)) for found in runs for arm in ARMS)
        table = []
        for arm, name in ARMS.items():
            by_seed = [accuracies(found, arm) for found in runs]
            steps = max(map(len, by_seed))
            cells = [shown([row[i] for row in by_seed]) if i < steps else "" for i in range(length)]
            if arm == "answers-alone":  # one fine-tuning, as long as the last iteration's
                cells = ["", *[""] * (length - 2), cells[0]]
            table.append([name, *cells])
        parts.append(markdown_table(["arm", *map(str, range(length))], table, text_columns=1) + "\n")
        table = []
        for arm, source, name in (
            ("with-rationalisation", "sample", "with, sampled"),
            ("with-rationalisation", "rationalize", "with, rationalised"),
            ("without-rationalisation", "sample", "without, sampled"),
        ):
            by_seed_inside = [right_inside(found, arm, source) for found in runs]
            cells = []
            for i in range(1, length):
                values = [row[i] for row in by_seed_inside if i < len(row) and row[i] is not None]
                cells.append(f"{shown(values)} ({len(values)})" if values else "none kept")
            table.append([name, *cells])
        heads = ["right inside, % (seeds that kept any)", *map(str, range(1, length))]
        parts.append(markdown_table(heads, table, text_columns=1) + "\n")
        table = [
            [str(found.seed), name, *[f"{value:.1f}" for value in accuracies(found, arm)]]
            for found in runs
            for arm, name in ARMS.items()
        ]
        heads = ["seed", "arm", *map(str, range(length))]
        table = [row + [""] * (len(heads) - len(row)) for row in table]
        parts.append(markdown_table(heads, table, text_columns=2) + "\n")
    return "\n".join(parts)


def write_csv(file: Path, measured: Mapping[str, list[Run]]) -> None:
    with file.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(
            ["regime", "seed", "arm", "iteration", "held_out_accuracy", "group", "right_inside_rationalized"]
        )
        for regime, runs in measured.items():
            for found in runs:
                for arm in ARMS:
                    for row in found.arms[arm]["iterations"]:
                        inside = row.get("built", {}).get("right_inside_rationalize", "")
                        groups = {"all": row["held_out"]["accuracy"], **row["held_out"]["by_group"]}
                        for group, value in groups.items():
                            writer.writerow([regime, found.seed, arm, row["iteration"], value, group, inside])


def draw(file: Path, measured: Mapping[str, list[Run]]) -> None:
    colours = {"with-rationalisation": 1, "without-rationalisation": 2, "answers-alone": 7}
    plates, series = [], []
    for regime, runs in measured.items():
        series = []
        end = max(len(accuracies(found, arm)) for found in runs for arm in ARMS) - 1
        for arm, name in ARMS.items():
            by_seed = [accuracies(found, arm) for found in runs]
            if arm == "answers-alone":  # one fine-tuning, as long as the last iteration's: a level line
                by_seed = [[row[0], row[0]] for row in by_seed]
            x = [0, end] if arm == "answers-alone" else list(range(len(by_seed[0])))
            series.append(mean_curve(name, x, by_seed, colour=colours[arm], dashed=arm == "answers-alone"))
        title = f"{regime}, {len(runs)} seeds"
        chart = line_chart(series, label=title, x_label="iteration", y_scale=linear_scale(0.0, 100.0))
        plates.append(Plate(title, chart))
    title = "Held-out accuracy in per cent, with and without rationalisation: mean and range over seeds"
    file.write_text(figure(title, plates, columns=2, keys=keys_of(series)), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Benchmark(__file__, __doc__)
    parser.add_folders("runs/star-seeds")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_threads(help="CPU threads of a run")
    parser.add_argument("--workers", type=int, default=2, help="runs at once")
    parser.add_quick(seeds=1)
    parser.add_argument("--regimes", nargs="*", default=list(REGIMES), choices=list(REGIMES), metavar="REGIME")
    parser.add_argument("extra", nargs="*", help="after --: options of quietstar.star for every run")
    options = parser.begin(arguments)
    options.output = options.output.resolve()
    jobs = [(regime, seed) for seed in range(options.seeds) for regime in options.regimes]
    with ThreadPoolExecutor(options.workers) as pool:
        finished = list(pool.map(lambda job: run(*job, options), jobs))
    measured: dict[str, list[Run]] = {regime: [] for regime in options.regimes}
    for (regime, _), found in zip(jobs, finished, strict=True):
        measured[regime].append(found)
    body = markdown(measured)
    options.results.mkdir(parents=True, exist_ok=True)
    write_csv(options.results / "star.csv", measured)
    draw(options.results / "star.svg", measured)
    title = "STaR on addition: with and without rationalisation"
    parser.write(options.results / "star", title, body, after="\n![accuracy by iteration](star.svg)")


if __name__ == "__main__":
    main()
