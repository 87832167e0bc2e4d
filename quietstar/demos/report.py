"""Table, figure and thoughts of the embedded default."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quietstar.config.training import TrainConfig
from quietstar.demos.measure import CLASSES
from quietstar.runs.files import METRICS
from quietstar.training.metrics import read_metrics

ARMS = {
    "before": "before Quiet-STaR",
    "quietstar": "Quiet-STaR",
    "no_reinforce": "control: no REINFORCE",
    "pause": "control: pause tokens",
    "language_modeling": "control: plain language modelling",
}

Measures = Mapping[str, Any]
Results = Mapping[int, Mapping[str, Measures]]
"""Measures of each arm, by seed."""

COLUMNS: dict[str, Callable[[Measures], float | None]] = {
    "answer NLL, no thought": lambda m: m["nll_base"],
    "answer NLL, with thought": lambda m: m["nll_talk"],
    "accuracy, no thought": lambda m: m["accuracy_base"],
    "accuracy, with thought": lambda m: m["accuracy_talk"],
    "correct workings": lambda m: m["correct_workings"],
    "scrambled thought NLL": lambda m: m["scrambled_nll"],
    "all characters NLL, no thought": lambda m: m["characters"]["base"],
    "all characters NLL, with thought": lambda m: m["characters"]["talk"],
    "weight": lambda m: m["mixing_weight"],
}


def write_report(config: TrainConfig, results: Results, out: Path) -> str:
    """Write `results.json`, `results.md` and, with matplotlib, `curves.png`.

    Returns:
        The Markdown text.
    """
    (out / "results.json").write_text(json.dumps(results, indent=1))
    figure = draw_curves(results, out)
    text = markdown(config, results)
    (out / "results.md").write_text(text)
    where = f"{text}\nWritten to {out}: results.md, results.json"
    return f"{where}, curves.png" if figure else f"{where}. (pip install 'quietstar[plot]' adds the figure.)"


def markdown(config: TrainConfig, results: Results) -> str:
    """The tables and thoughts as Markdown."""
    seeds = list(results)
    first = results[seeds[0]]
    arms = [arm for arm in ARMS if arm in first]
    measured = first[arms[0]]
    lines = [
        f"Held-out sums modulo 7: {measured['answers']} answers to {measured['distinct_expressions']} expressions, "
        f"2 sampled thoughts each; NLL in nats (chance is ln 7 = {math.log(7):.3f}); "
        + (f"mean ± standard error over {len(seeds)} seeds." if len(seeds) > 1 else f"seed {seeds[0]}."),
        "",
        "| | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for arm in arms:
        cells = [
            "-"
            if arm == "pause" and name in ("correct workings", "scrambled thought NLL")
            else spread([column(results[seed][arm]) for seed in seeds])
            for name, column in COLUMNS.items()
        ]
        lines.append(f"| {ARMS[arm]} | " + " | ".join(cells) + " |")
    fixed = first["before"]["fixed_weights"]
    best = min(fixed, key=lambda w: sum(results[s]["before"]["fixed_weights"][w] for s in seeds))
    if len(seeds) > 1:
        before, after = (
            ", ".join(f"{COLUMNS[column](results[seed][arm]):.3f}" for seed in seeds)
            for column, arm in (("correct workings", "before"), ("answer NLL, with thought", "quietstar"))
        )
        lines += [
            "",
            f"Seed by seed: correct workings before Quiet-STaR {before}; answer NLL with thought after it {after}. A "
            "character model that has learned no workings from its textbook leaves nothing to select.",
            "",
            "Another machine, another number of threads or another version of a library rounds differently and acts "
            "like another seed, so an interval from the seeds of one machine is too narrow.",
        ]
    lines += [
        "",
        f"Before Quiet-STaR at the best fixed weight ({best} of {', '.join(fixed)}): answer NLL with thought "
        + spread([results[seed]["before"]["fixed_weights"][best] for seed in seeds])
        + ". That much of the gain exists without any training.",
        "",
        "Gain of Quiet-STaR by kind of character, nats: "
        + ", ".join(
            f"{kind} {spread([results[s]['quietstar']['characters'][f'gain {kind}'] for s in seeds])}"
            for kind in CLASSES
        )
        + ".",
        "",
        "| text | thought before | thought after |",
        "|---|---|---|",
    ]
    for (text, before), (_, after) in zip(first["before"]["thoughts"], first["quietstar"]["thoughts"], strict=True):
        lines.append(f"| `{text}` | {_code(before)} | {_code(after)} |")
    lines += [
        "",
        "What this shows: from plain text without brackets or labels a model that knows the workings learns when to "
        "think, and which of the two asides of its textbook to think. It does not invent the working, and this says "
        "nothing about natural text.",
        "",
    ]
    return "\n".join(lines)


def spread(values: Sequence[float | None]) -> str:
    """Mean, and the standard error where there are several values."""
    numbers = [value for value in values if value is not None]
    mean = sum(numbers) / len(numbers)
    shown = f"{round(mean, 3) + 0.0:.3f}"  # adding zero turns "-0.000" into "0.000"
    if len(numbers) < 2:
        return shown
    variance = sum((value - mean) ** 2 for value in numbers) / (len(numbers) - 1)
    return f"{shown} ± {math.sqrt(variance / len(numbers)):.3f}"


def draw_curves(results: Results, out: Path) -> bool:
    """Draw the course of training to `curves.png`; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        ("answer NLL (nats)", (("nll_base", "no thought", "--"), ("nll_talk", "with thought", "-"))),
        ("answer accuracy", (("accuracy_base", "no thought", "--"), ("accuracy_talk", "with thought", "-"))),
        ("share of correct workings", (("correct_workings", "", "-"),)),
    )
    colors = {"quietstar": "#0072B2", "no_reinforce": "#D55E00", "pause": "#009E73"}
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 3.8), layout="constrained")
    for axis, (title, lines) in zip(axes, panels, strict=True):
        for arm, color in colors.items():
            for number, seed in enumerate(results):
                if arm not in results[seed]:
                    continue
                curve = read_metrics(out / f"seed-{seed}" / arm / METRICS, split="eval")
                steps = [point["step"] for point in curve]
                for key, name, style in lines:
                    if arm == "pause" and key == "correct_workings":
                        continue
                    label = ", ".join(part for part in (ARMS[arm].removeprefix("control: "), name) if part)
                    values = [point[key] for point in curve]
                    axis.plot(
                        steps, values, style, color=color, lw=1.6, alpha=0.9, label=label if number == 0 else None
                    )
        axis.set(title=title, xlabel="optimizer step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].axhline(math.log(7), color="0.4", lw=0.8, ls=":", label="chance")
    axes[0].legend(fontsize=8)
    figure.suptitle("Held-out sums modulo 7, while training on direct lines only", fontsize=11)
    figure.savefig(out / "curves.png", dpi=150)
    plt.close(figure)
    return True


def _code(text: str) -> str:
    return "`" + text.replace("\n", "⏎") + "`"
