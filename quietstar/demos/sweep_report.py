"""Table and figure of a sweep.

The figure of a sweep: what each option does to the answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from quietstar.demos.variations import DEFAULT, Ablation, Arm, Sweep
from quietstar.runs.files import write_json, write_whole
from quietstar.runs.machine import environment
from quietstar.statistics.seeds import CONFIDENCE, Estimate, estimate

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


Panel = Mapping[str, Sequence[float]]
"""Answer NLL with thought of each seed, by the option's value."""

VARIED, STANDARD = "#0072B2", "#D55E00"  # blue and vermilion look different to colour-blind eyes too
MOST_COLUMNS = 3
LOG_FROM = 4.0
"""Ratio of the largest to the smallest NLL from which the axis is logarithmic."""
SMALLEST = 1e-6


def draw_sweep(panels: Mapping[str, Panel], defaults: Mapping[str, str], file: Path) -> bool:
    """Draw one panel per option: a point per seed, the mean, and its interval.

    Args:
        panels: By the option's dotted key.
        defaults: The default's value of each option.
        file: PNG to write.

    Returns:
        False where there is no matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter

    columns = min(MOST_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (4.3 * columns + 0.4, 3.4 * rows + 0.9)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axis in grid.flat[len(panels) :]:
        axis.set_visible(False)
    seeds = len(next(iter(next(iter(panels.values())).values())))
    for axis, (key, panel) in zip(grid.flat, panels.items(), strict=False):
        for place, (value, nlls) in enumerate(panel.items()):
            standard = value == defaults[key]
            color = STANDARD if standard else VARIED
            mean = estimate(nlls)
            if mean.low is not None and mean.high is not None:
                ends = [max(mean.low, SMALLEST), mean.high]
                axis.plot([place, place], ends, "-_", color=color, lw=1.8, ms=9, mew=1.8)
            offsets = [0.16 + 0.07 * index for index in range(len(nlls))]
            axis.scatter([place + offset for offset in offsets], nlls, s=16, facecolor="none", edgecolor="0.35", lw=0.9)
            axis.plot(place, mean.mean, "D" if standard else "o", color=color, ms=5.5)
        axis.axhline(math.log(7), color="0.4", lw=0.8, ls=":")
        axis.set_xticks(range(len(panel)), panel)
        axis.set_xlim(-0.5, len(panel) - 0.5 + 0.07 * seeds)
        axis.set_title(key, fontsize=11)
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelleft=True)
    nlls = [math.log(7), *(nll for panel in panels.values() for seeds in panel.values() for nll in seeds)]
    low, high = max(min(nlls), SMALLEST), max(nlls)
    # All seeds are shown. An interval may be cut off: of a few seeds that disagree it can be wider than any NLL.
    if high / low > LOG_FROM:  # or what works, and how well, would lie in one place
        grid[0][0].set_yscale("log")
        grid[0][0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        grid[0][0].yaxis.set_major_formatter("{x:g}")
        grid[0][0].yaxis.set_minor_formatter(NullFormatter())
        grid[0][0].set_ylim(low / 1.3, high * 1.3)
    else:
        margin = 0.02 + 0.3 * (high - low)
        grid[0][0].set_ylim(low - margin, high + margin)
    for row in grid:
        row[0].set_ylabel("answer NLL with thought (nats)")
    handles = [
        Line2D([], [], color=VARIED, marker="o", lw=0, ms=5.5, label="value"),
        Line2D([], [], color=STANDARD, marker="D", lw=0, ms=5.5, label="the default's value"),
        Line2D([], [], color="0.35", marker="o", markerfacecolor="none", lw=0, ms=4, label="a seed"),
        Line2D([], [], color="0.4", lw=0.8, ls=":", label="chance"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4 if columns > 1 else 2, frameon=False, fontsize=9)
    spread = f"mean over {seeds} seeds, {CONFIDENCE:.0%} interval" if seeds > 1 else "one seed"
    figure.suptitle(f"Held-out sums modulo 7, one option varied at a time\n{spread}", fontsize=11)
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return True
