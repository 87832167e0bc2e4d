"""The results of the embedded default: table, figure and thoughts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quietstar.config.training import TrainConfig
from quietstar.demos.measure import CLASSES
from quietstar.reporting.charts import Plate, figure, keys_of, line_chart
from quietstar.reporting.scales import Series, linear_scale, mean_curve
from quietstar.runs.files import METRICS
from quietstar.statistics.intervals import estimate, rounded
from quietstar.training.metrics import read_metrics

ARMS = {
    "before": "before Quiet-STaR",
    "quietstar": "Quiet-STaR",
    "no_reinforce": "control: no REINFORCE",
    "pause": "control: pause tokens",
    "language_modeling": "control: plain language modelling",
}

DRAWN = {"quietstar": 1, "no_reinforce": 2, "pause": 3}
"""Colours of the arms that the figure shows."""
CURVES = "curves.svg"

Measures = Mapping[str, Any]
Results = Mapping[int, Mapping[str, Measures]]
"""Measures of each arm, by seed and name of the arm."""

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
    """Writes `results.json`, `results.md` and `curves.svg`.

    Returns:
        The Markdown text, and the names of the files.
    """
    (out / "results.json").write_text(json.dumps(results, indent=1))
    (out / CURVES).write_text(draw_curves(results, out), encoding="utf-8")
    text = markdown(config, results)
    (out / "results.md").write_text(text)
    return f"{text}\nWritten to {out}: results.md, results.json, {CURVES}"


def markdown(config: TrainConfig, results: Results) -> str:
    """Returns the tables and thoughts as Markdown."""
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
    """Returns the mean as text, with the standard error if there are several values."""
    found = estimate([value for value in values if value is not None])
    error = "" if found.standard_error is None else f" ± {found.standard_error:.3f}"
    return f"{rounded(found.mean)}{error}"


def draw_curves(results: Results, out: Path) -> str:
    """Returns the course of training as an SVG: a curve for each arm; with several seeds their mean and their range.

    Args:
        results: Measures of the seeds and arms to draw.
        out: Output directory of the experiment, which holds the metrics of all seeds.
    """
    curves = {
        arm: [read_metrics(out / f"seed-{seed}" / arm / METRICS, split="eval") for seed in results]
        for arm in DRAWN
        if all(arm in arms for arms in results.values())
    }
    chance = math.log(7)

    def series(key: str) -> list[Series]:
        return [
            mean_curve(
                ARMS[arm].removeprefix("control: "),
                [point["step"] for point in seeds[0]],
                list(zip(*([point[key] for point in line] for line in zip(*seeds, strict=False)), strict=True)),
                colour=DRAWN[arm],
            )
            for arm, seeds in curves.items()
            if not (arm == "pause" and key == "correct_workings")  # pause thoughts have no content
        ]

    highest = max(float(one.y.max()) for key in ("nll_base", "nll_talk") for one in series(key))
    nll, share = linear_scale(0.0, max(chance, highest)), linear_scale(0.0, 1.0)
    plates = []
    for title, key, scale in (
        ("Answer NLL without thought (nats)", "nll_base", nll),
        ("Answer NLL with thought (nats)", "nll_talk", nll),
        ("Share of correct workings", "correct_workings", share),
        ("Answer accuracy without thought", "accuracy_base", share),
        ("Answer accuracy with thought", "accuracy_talk", share),
    ):
        levels = [(chance, "chance")] if scale is nll else []
        chart = line_chart(series(key), label=title, x_label="optimizer step", y_scale=scale, levels=levels)
        plates.append(Plate(title, chart))
    over = f"; mean of {len(results)} seeds, shaded from lowest to highest" if len(results) > 1 else ""
    title = f"Held-out sums modulo 7, while training on direct lines only{over}"
    return figure(title, plates, columns=3, keys=keys_of(series("nll_talk")))


def _code(text: str) -> str:
    return "`" + text.replace("\n", "⏎") + "`"
