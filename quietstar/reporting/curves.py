"""The panels of a training report: which measurements are drawn together, and how.

`Curves` holds the measurements and draws any panel; the functions below it list the panels of each section.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from quietstar.reporting.charts import MOST_LINES, bar_chart, chart_card, colour_key, legend
from quietstar.reporting.page import panel
from quietstar.reporting.scales import Floats, Series, number

Lines = Sequence[Mapping[str, Any]]
SPLITS = {"train": "training", "eval": "held-out"}
NOT_DRAWN = frozenset({"step", "split", "seconds", "mixing_weight_deviation"})
"""Entries of a line that are not measurements, or follow from others."""
DECILES = [f"gain_decile_{index}" for index in range(10)]


class Curves:
    """The measurements of a run by split and name, and panels of them; `left_over` draws what no panel has shown.

    Args:
        lines: Lines of `metrics.jsonl` as dicts.
        marks: (step, text) of each event of the run, drawn as a vertical line.
    """

    def __init__(self, lines: Lines, marks: Sequence[tuple[float, str]] = ()) -> None:
        self._lines = {split: [line for line in lines if line["split"] == split] for split in SPLITS}
        self._steps = {split: np.array([line["step"] for line in found], float) for split, found in self._lines.items()}
        names = {split: {name for line in found for name in line} for split, found in self._lines.items()}
        self._names = {split: found - NOT_DRAWN for split, found in names.items()}
        self._shown: set[str] = set()
        every = np.concatenate(list(self._steps.values()))
        self._range = (float(every.min()), float(every.max())) if len(every) else (0.0, 1.0)
        self._marks = [mark for mark in marks if self._range[0] <= mark[0] <= self._range[1]]

    def has(self, split: str, name: str) -> bool:
        """Returns whether a measurement exists for a split."""
        return name in self._names[split]

    def numbered(self, name: str) -> list[str]:
        """Returns the measured names among `name_0`, `name_1`, ..., in this order."""
        pattern = re.compile(rf"{re.escape(name)}_(\d+)")
        found = {int(match[1]) for names in self._names.values() for one in names if (match := pattern.fullmatch(one))}
        return [f"{name}_{index}" for index in sorted(found)]

    def values(self, split: str, name: str) -> Floats:
        """Returns one number for each line of the split, float64 [n]; NaN where the line has none."""
        return np.array([_as_float(line.get(name)) for line in self._lines[split]])

    def lines_panel(
        self,
        title: str,
        note: str,
        curves: Iterable[tuple[str, str, int]],
        *,
        splits: Sequence[str] = ("train", "eval"),
        log: bool = False,
        square: str | None = None,
        also: Sequence[str] = (),
    ) -> str:
        """Returns a panel of curves, training faint and held-out strong; empty if none of them was measured.

        Args:
            title: Title of the panel.
            note: Sentence about what the panel shows.
            curves: (name of the measurement, name in the legend, colour) of each curve.
            splits: Splits to draw, of `train` and `eval`.
            log: Whether the vertical axis is logarithmic.
            square: Name of the measured mean square of the drawn measurement; one standard deviation is then shaded.
            also: Names of measurements that count as shown although the panel has no curve of them.
        """
        curves = list(curves)
        self._shown.update([*also, *(name for name, _, _ in curves)])
        if square is not None:
            self._shown.add(square)
        series, missing = [], 0
        strong_exists = "eval" in splits and any(name in self._names["eval"] for name, _, _ in curves)
        for split in splits:
            for name, text, colour in curves:
                if name not in self._names[split]:
                    continue
                y = self.values(split, name)
                missing += int(sum(not math.isfinite(_as_float(line.get(name, 0.0))) for line in self._lines[split]))
                spread = None
                if square is not None and split == ("eval" if strong_exists else "train"):
                    spread = np.sqrt(np.maximum(self.values(split, square) - y**2, 0.0))
                both = strong_exists and len(splits) > 1
                label = f"{text}, {SPLITS[split]}".strip(", ") if both else text or SPLITS[split]
                faint = split == "train" and strong_exists
                series.append(Series(label, self._steps[split], y, colour, faint=faint, spread=spread))
        if missing:
            note = f"{note} {missing} {'value is' if missing == 1 else 'values are'} not finite."
        return chart_card(title, note, series, x_range=self._range, log=log, marks=self._marks)

    def by_difficulty(self) -> str:
        """Returns a panel of the gain by decile of the NLL without thought, at the first and the last evaluation."""
        self._shown.update(DECILES)
        measured = [line for line in self._lines["eval"] if any(name in line for name in DECILES)]
        if not measured:
            return ""
        ends = measured[:1] + measured[-1:] if len(measured) > 1 else measured
        colours = (7, 1) if len(ends) > 1 else (1,)
        groups = [
            (f"step {number(line['step'], 9)}", colour, [_as_float(line.get(name)) for name in DECILES])
            for line, colour in zip(ends, colours, strict=True)
        ]
        note = "Held-out targets in ten equal parts by their NLL without thought; nats."
        chart = bar_chart(
            [str(index + 1) for index in range(10)],
            groups,
            label=f"Gain by difficulty. {note}",
            x_label="easiest to hardest tenth",
        )
        names = legend([colour_key(name, colour) for name, colour, _ in groups])
        return panel("Gain by difficulty of the token", note, chart and names + chart)

    def left_over(self) -> list[str]:
        """Returns a panel for each measurement that no other panel has shown so far."""
        rest = sorted(set().union(*self._names.values()) - self._shown)
        return [self.lines_panel(name.replace("_", " "), "", [(name, "", 1)]) for name in rest]


def prediction_panels(curves: Curves) -> list[str]:
    """Returns the panels of how well the text is predicted, without and with thought."""
    gains = curves.numbered("gain")
    some = gains[:: math.ceil(len(gains) / MOST_LINES)] if gains else []
    left_out = f" {len(some)} of the {len(gains)} are drawn." if len(some) < len(gains) else ""
    by_lookahead = [
        (name, f"{_ordinal(int(name.rsplit('_', 1)[1]) + 1)} token", place) for place, name in enumerate(some, start=1)
    ]
    return [
        curves.lines_panel(
            "With and without thought",
            "Mean NLL of the tokens after thoughts, in nats; lower is better.",
            [("base_nll", "without", 2), ("talk_nll", "with", 1)],
        ),
        curves.lines_panel(
            "Gain", "NLL without thought less NLL with it, in nats; above 0 thoughts help.", [("gain", "", 1)]
        ),
        curves.lines_panel(
            "Gain by lookahead",
            f"The gain of the first token after the thought, the second, and so on.{left_out}",
            by_lookahead,
            also=gains,
            splits=("eval",) if curves.has("eval", "gain_0") else ("train",),
        ),
        curves.by_difficulty(),
        curves.lines_panel("Text", "Mean NLL of the whole text without thought, in nats.", [("text_nll", "", 2)]),
        curves.lines_panel(
            "Loss",
            "What is minimised in training; on held-out text the part that is the prediction.",
            [("loss", "", 1)],
        ),
    ]


def lookahead_panels(curves: Curves) -> list[str]:
    """Returns a panel for each lookahead position; none if there is only one position."""
    pairs = list(zip(curves.numbered("base_nll"), curves.numbered("talk_nll"), strict=False))
    drawn = [
        curves.lines_panel(
            f"{_ordinal(int(base.rsplit('_', 1)[1]) + 1).capitalize()} token after the thought",
            "NLL in nats.",
            [(base, "without", 2), (talk, "with", 1)],
        )
        for base, talk in pairs
    ]
    return drawn if len(pairs) > 1 else []


def thought_panels(curves: Curves) -> list[str]:
    """Returns the panels of the thoughts and their rewards."""
    return [
        curves.lines_panel(
            "Reward",
            "Mean reward of a thought, in nats: how much better all lookahead tokens are predicted.",
            [("reward", "", 1)],
        ),
        curves.lines_panel(
            "Size of reward and advantage",
            "Mean absolute values, in nats; the advantage is what REINFORCE learns from.",
            [("reward_size", "reward", 1), ("advantage_size", "advantage", 2)],
        ),
        curves.lines_panel(
            "Mixing weight",
            "Weight of the prediction after the thought; shaded: one standard deviation.",
            [("mixing_weight", "", 1)],
            square="mixing_weight_square",
        ),
        curves.lines_panel(
            "Entropy of thoughts", "Of each sampled token, estimated, in nats.", [("thought_entropy", "", 1)]
        ),
        curves.lines_panel(
            "Log-probability of thoughts",
            "Of each token at the policy's temperature, in nats.",
            [("thought_logprob", "", 1)],
        ),
        curves.lines_panel("Policy loss", "The REINFORCE loss before its weight.", [("policy_loss", "", 1)]),
    ]


def optimisation_panels(curves: Curves) -> list[str]:
    """Returns the panels of gradients, learning rate and speed."""
    return [
        curves.lines_panel(
            "Gradients of the two losses",
            "2-norms on held-out text, weights included: language model and policy apart. Logarithmic.",
            [("gradient_norm_lm", "language model", 2), ("gradient_norm_policy", "policy", 1)],
            log=True,
        ),
        curves.lines_panel(
            "Gradient norms",
            "Of a training step before clipping. Logarithmic.",
            [("gradient_norm", "all else", 1), ("thought_embedding_gradient_norm", "START and END", 4)],
            log=True,
        ),
        curves.lines_panel("Learning rate", "Of the base model.", [("learning_rate", "", 1)]),
        curves.lines_panel("Speed", "Text tokens per second of training.", [("tokens_per_second", "", 3)]),
        skipped_panel(curves),
    ]


def skipped_panel(curves: Curves) -> str:
    """Returns the panel of skipped steps; empty if no step was skipped."""
    drawn = curves.lines_panel(
        "Skipped steps", "Since the line before; their loss or gradient was not finite.", [("skipped_steps", "", 1)]
    )
    return drawn if any((curves.values(split, "skipped_steps") > 0).any() for split in SPLITS) else ""


def _as_float(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _ordinal(count: int) -> str:
    words = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
    return words[count - 1] if count <= len(words) else f"{count}th"
