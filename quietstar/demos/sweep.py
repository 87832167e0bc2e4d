"""Runs the arms of a sweep for every seed, and writes the sweep's table and figure.

First comes the table, then the figure, then `run_sweep`, which trains every arm from the seed's character model and
measures it like the default.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from quietstar.config.training import TrainConfig
from quietstar.demos.options import DEFAULT, Ablation, Arm, Sweep, base_options, of_seed
from quietstar.demos.textbook import (
    BASE,
    delete_finished,
    finished_measures,
    has_read,
    held_out_texts,
    in_words,
    read_textbook,
    seed_directory,
    train_arm,
    write_texts,
)
from quietstar.reporting.charts import Plate, Spread, figure, marker_key, seed_key, spread_chart
from quietstar.reporting.scales import Scale, linear_scale
from quietstar.runs.files import RunLock, make_output_dir, write_json, write_whole
from quietstar.runs.machine import environment
from quietstar.statistics.intervals import CONFIDENCE, Estimate, estimate

Results = Mapping[int, Mapping[str, Mapping[str, Any]]]
"""Measures of each arm, by seed and name of the arm."""

MEASURES = {
    "answer NLL, with thought": "nll_talk",
    "accuracy, with thought": "accuracy_talk",
    "correct workings": "correct_workings",
}
FIGURE = "sweep.svg"


def write_sweep_report(sweep: Sweep, results: Results, out: Path) -> str:
    """Writes `results.json`, `results.md` and `sweep.svg`.

    Args:
        sweep: Sweep with the arms to show.
        results: Measures of the finished seeds, at least one seed.
        out: Directory of the sweep.

    Returns:
        The table as Markdown, and the names of the files.
    """
    write_json(out / "results.json", _as_json(sweep, results))
    panels = {
        ablation.key: {text: _nlls(arm, results) for text, arm in ablation.arms.items()} for ablation in sweep.ablations
    }
    defaults = {ablation.key: _default_text(ablation) for ablation in sweep.ablations}
    write_whole(out / FIGURE, draw_sweep(panels, defaults))
    table = _table(sweep, results)
    image = f"\n![Answer NLL with thought by option]({FIGURE})\n"
    title = "# Options of the embedded default, varied one at a time"
    write_whole(out / "results.md", f"{title}\n\n{table}{image}\n## Measured with\n\n{_facts()}\n")
    return f"{table}\nWritten to {out}: results.md, results.json, {FIGURE}"


def _table(sweep: Sweep, results: Results) -> str:
    config = sweep.default.config
    seeds = list(results)
    columns = ["option", "value", *MEASURES, "NLL, difference from the default", "seconds"]
    if len(seeds) > 1:
        spread = (
            f"Mean ± standard error over {len(seeds)} seeds [{CONFIDENCE:.0%} interval, Student's t]; differences are "
            "taken within a seed, whose arms start from the same character model."
        )
    else:
        spread = f"Seed {seeds[0]} alone, so nothing is known of the spread."
    lines = [
        f"{spread} NLL in nats (chance is ln 7 = 1.946), after {config.training.steps} steps of Quiet-STaR, on "
        "held-out sums. A working counts as correct as far as it fits into the thought. Each arm is measured with its "
        "own options. Seconds are those of training and measuring one arm.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---|---|" + "---:|" * (len(columns) - 2),
        _row("", "the default", sweep.default, results),
    ]
    for ablation in sweep.ablations:
        for text, arm in ablation.arms.items():
            if arm.name != DEFAULT:
                value = f"`{text}` (default: `{_default_text(ablation)}`)"
                lines.append(_row(f"`{ablation.key}`", value, arm, results))
    return "\n".join(lines) + "\n"


def _row(option: str, value: str, arm: Arm, results: Results) -> str:
    cells = [option, value]
    for key in MEASURES.values():
        pause = key == "correct_workings" and arm.config.model.thinking == "pause"  # pause thoughts have no content
        cells.append("-" if pause else str(_estimate(arm, results, key)))
    cells.append("-" if arm.name == DEFAULT else str(_difference(arm, results)))
    cells.append(f"{_estimate(arm, results, 'seconds').mean:.0f}")
    return "| " + " | ".join(cells) + " |"


def _estimate(arm: Arm, results: Results, key: str) -> Estimate:
    return estimate([arms[arm.name][key] for arms in results.values()])


def _difference(arm: Arm, results: Results) -> Estimate:
    return estimate([arms[arm.name]["nll_talk"] - arms[DEFAULT]["nll_talk"] for arms in results.values()])


def _nlls(arm: Arm, results: Results) -> list[float]:
    return [arms[arm.name]["nll_talk"] for arms in results.values()]


def _default_text(ablation: Ablation) -> str:
    return next(text for text, arm in ablation.arms.items() if arm.name == DEFAULT)


def _as_json(sweep: Sweep, results: Results) -> dict[str, Any]:
    def of_arm(arm: Arm) -> dict[str, Any]:
        estimates = {key: asdict(_estimate(arm, results, key)) for key in MEASURES.values()}
        measures = {str(seed): dict(arms[arm.name]) for seed, arms in results.items()}
        return {**estimates, "difference": asdict(_difference(arm, results)), "seeds": measures}

    return {
        "confidence": CONFIDENCE,
        "environment": environment(),
        "arms": {arm.name: of_arm(arm) for arm in sweep.arms()},
        "options": {
            ablation.key: {text: arm.name for text, arm in ablation.arms.items()} for ablation in sweep.ablations
        },
    }


def _facts() -> str:
    """Returns command, versions and hardware as a Markdown list."""
    found = environment()
    git = found["git"]
    commit = "none" if git is None else git["commit"][:7] + (", with changes" if git["dirty"] else "")
    facts = {
        "command": found["command"],
        "date": found["started"][:10],
        "commit": commit,
        "python": found["python"],
        **found["packages"],
        "cpu": f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']:.0f} GiB",
        "torch threads": torch.get_num_threads(),
    }
    if found["devices"]:
        facts["gpu"] = ", ".join(found["devices"])
    return "\n".join(f"- {name}: `{value}`" for name, value in facts.items())


Panel = Mapping[str, Sequence[float]]
"""Answer NLL with thought of each seed, in nats, by the option's value."""

VARIED, STANDARD = 1, 2
"""Colours of the varied values and of the default value."""
MOST_COLUMNS = 3
LOG_FROM = 4.0
"""Ratio of the largest to the smallest NLL from which the axis is logarithmic."""
SMALLEST = 1e-6


def draw_sweep(panels: Mapping[str, Panel], defaults: Mapping[str, str]) -> str:
    """Returns one chart per option as an SVG: the mean of each value with its interval, and a point for each seed.

    Args:
        panels: Answer NLLs to draw, by dotted key of the option.
        defaults: Default value of each option as text, by dotted key.
    """
    chance = math.log(7)
    scale = _scale([chance, *(nll for panel in panels.values() for nlls in panel.values() for nll in nlls)])
    plates = []
    for key, panel in panels.items():
        spreads = []
        for value, nlls in panel.items():
            mean = estimate(nlls)
            ends = None if mean.low is None or mean.high is None else (mean.low, mean.high)
            spreads.append(Spread(value, mean.mean, nlls, ends, STANDARD if value == defaults[key] else VARIED))
        label = f"Answer NLL with thought by {key}"
        chart = spread_chart(spreads, label=label, x_label="value", y_scale=scale, levels=[(chance, "chance")])
        plates.append(Plate(key, chart))
    seeds = len(next(iter(next(iter(panels.values())).values())))
    over = f"mean over {seeds} seeds, {CONFIDENCE:.0%} interval" if seeds > 1 else "one seed"
    keys = [marker_key("value", VARIED), marker_key("the default's value", STANDARD), seed_key("a seed")]
    title = f"Answer NLL with thought (nats) on held-out sums modulo 7, one option varied at a time; {over}"
    return figure(title, plates, columns=MOST_COLUMNS, keys=keys)


def _scale(nlls: Sequence[float]) -> Scale:
    """Returns an axis that holds all seeds. It may cut intervals: with few seeds that disagree they can exceed any
    NLL.
    """
    low, high = max(min(nlls), SMALLEST), max(nlls)
    if high / low <= LOG_FROM:
        margin = 0.02 + 0.3 * (high - low)
        return linear_scale(max(0.0, low - margin), high + margin)
    low, high = low / 1.3, high * 1.3  # linear, all small NLLs would lie in one place
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    return Scale(low, high, tuple(tick for tick in ticks if low <= tick <= high), log=True)


def run_sweep(sweep: Sweep) -> None:
    """Runs the unfinished arms, prints the table, and writes table and figure to the default's `output_dir`.

    The character model of a seed is made once and shared by the seed's arms; the report is written after each seed.
    With `training.resume` off, files that the arms of this sweep wrote there are deleted first.

    Raises:
        ConfigError: The directory cannot be written to, or another sweep runs in it.
        CheckpointError: A file there was made with other options; then nothing has been changed.
    """
    started = time.monotonic()
    config = sweep.default.config
    out, arms = Path(config.output_dir), sweep.arms()
    first = config.training.seed
    seeds = range(first, first + config.textbook.seeds)
    make_output_dir(out)
    with RunLock(out):
        for seed in seeds:
            if config.training.resume:
                for arm in arms:
                    options = _of_arm(arm, sweep, seed)
                    has_read(options)
                    finished_measures(options)
            else:
                delete_finished(seed_directory(out, seed), [arm.name for arm in arms])
        results: dict[int, dict[str, Mapping[str, Any]]] = {}
        for seed in seeds:
            results[seed] = {arm.name: _run_arm(arm, _of_arm(arm, sweep, seed)) for arm in arms}
            report = write_sweep_report(sweep, results, out)
    print(report)
    print(f"This command took {time.monotonic() - started:.0f} s.")


def _of_arm(arm: Arm, sweep: Sweep, seed: int) -> TrainConfig:
    """Returns the options of an arm for one seed; arms share the seed's character model unless they need another."""
    directory = seed_directory(Path(sweep.default.config.output_dir), seed)
    own = base_options(arm.config) != base_options(sweep.default.config)
    base = (directory / arm.name if own else directory) / BASE
    plain = replace(arm.config, preset="plain")  # it trains like any other model
    return of_seed(plain, seed, directory / arm.name, base)


def _run_arm(arm: Arm, config: TrainConfig) -> Mapping[str, Any]:
    label = f"seed {config.training.seed}, {arm.name}"
    measures = finished_measures(config)
    if measures is None:
        write_texts(config)
        read_textbook(config)
        measures = train_arm(config, held_out_texts(config), label)
    print(f"{label}: {in_words(measures)}", flush=True)
    return measures
