"""Table and figure of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from quietstar.files import write_whole
from quietstar.reporting.environment import environment
from quietstar.textbook.intervals import CONFIDENCE, Estimate, estimate
from quietstar.textbook.sweep_figure import draw_sweep
from quietstar.textbook.variations import DEFAULT, Ablation, Arm, Sweep
from quietstar.training.output_dir import write_json

Results = Mapping[int, Mapping[str, Mapping[str, Any]]]
"""Measures of each arm, by seed."""

MEASURES = {
    "answer NLL, with thought": "nll_talk",
    "accuracy, with thought": "accuracy_talk",
    "correct workings": "correct_workings",
}
FIGURE = "sweep.png"


def write_sweep_report(sweep: Sweep, results: Results, out: Path) -> str:
    """Write `results.json`, `results.md` and, with matplotlib, `sweep.png`.

    Args:
        sweep: Its arms.
        results: Of the seeds that are finished, at least one.
        out: The directory.

    Returns:
        The table.
    """
    write_json(out / "results.json", _as_json(sweep, results))
    panels = {
        ablation.key: {text: _nlls(arm, results) for text, arm in ablation.arms.items()} for ablation in sweep.ablations
    }
    defaults = {ablation.key: _default_text(ablation) for ablation in sweep.ablations}
    figure = draw_sweep(panels, defaults, out / FIGURE)
    table = _table(sweep, results)
    image = f"\n![Answer NLL with thought by option]({FIGURE})\n" if figure else ""
    title = "# Options of the embedded default, varied one at a time"
    write_whole(out / "results.md", f"{title}\n\n{table}{image}\n## Measured with\n\n{_facts()}\n")
    where = f"{table}\nWritten to {out}: results.md, results.json"
    return f"{where}, {FIGURE}" if figure else f"{where}. (pip install 'quietstar[plot]' adds the figure.)"


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
        pause = key == "correct_workings" and arm.config.model.thinking == "pause"  # whose thoughts have no content
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
    """Command, versions and hardware, as a list."""
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
