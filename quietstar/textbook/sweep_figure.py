"""The figure of a sweep: what each option does to the answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from quietstar.textbook.intervals import CONFIDENCE, estimate

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
