"""Charts as SVG, inside a page or as a separate file: without a script, in the page's colours, with values on hover.

Curves of one chart differ in colour and in marker, so that they stay apart for colour-blind readers and in grey print.
Each chart function comes with the legend that belongs to it; `figure` joins charts to one file; the helpers that draw
axes and curves stand last.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from quietstar.reporting.page import CHART_STYLE, LIGHT, panel, plain
from quietstar.reporting.scales import (
    Floats,
    Scale,
    Series,
    Thinned,
    finite_range,
    linear_scale,
    log_scale,
    number,
    thin,
)

SIZE, WIDE = (400, 210), (1100, 330)
"""Width and height in pixels of a chart beside others, and of one alone in its row."""
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 8, 34
MOST_LINES = 6
"""Largest number of curves in a chart that readers can still tell apart."""
MOST_HOVERS = 40
MOST_MARKS = 40
MOST_DOTS, SOME_DOTS = 60, 12
"""Largest number of points that all have a marker, and the approximate number of markers on a longer curve."""
MARKERS = (
    "m-2.6 0a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0 -5.2 0",
    "m-2.3 -2.3h4.6v4.6h-4.6z",
    "m0 -3.2l3 5.3h-6z",
    "m0 -3.5l3.5 3.5l-3.5 3.5l-3.5 -3.5z",
    "m0 3.2l3 -5.3h-6z",
    "m-1.2 -3.2h2.4v2h2v2.4h-2v2h-2.4v-2h-2v-2.4h2z",
    "m-3 -1.1h6v2.2h-6z",
)
"""Marker of each colour as an SVG path from its centre.

In order: circle, square, triangle, diamond, inverted triangle, plus, bar.
"""
SEED = "m-2 0a2 2 0 1 0 4 0a2 2 0 1 0 -4 0"
"""Marker of a single value as an SVG path from its centre."""
Key = tuple[str, str]
"""Entry of a legend: its name, and SVG of 26 x 10 pixels that shows what the name stands for."""
EDGE = 20
TITLE_LETTER = 9
"""Upper bound of the average width in pixels of a letter of the title."""
FIGURE_STYLE = """.ground { fill: var(--card); } text { font: 12px var(--sans); fill: var(--text); }
.title { font-size: 15px; font-weight: 600; } .name { font-size: 13px; font-weight: 600; }
.keys { fill: var(--muted); }
"""


@dataclass(frozen=True)
class Frame:
    """The axes of a drawing: they map numbers to positions in pixels.

    Args:
        x: Scale of the horizontal axis.
        y: Scale of the vertical axis.
        size: Width and height of the drawing in pixels.
    """

    x: Scale
    y: Scale
    size: tuple[int, int] = SIZE

    @property
    def inner(self) -> tuple[int, int]:
        """Width and height in pixels of the area between the axes."""
        return self.size[0] - LEFT - RIGHT, self.size[1] - TOP - BOTTOM

    def across(self, value: float) -> float:
        """Returns the horizontal position of a number, in pixels from the left edge."""
        return LEFT + self.x.place(value) * self.inner[0]

    def down(self, value: float) -> float:
        """Returns the vertical position of a number, in pixels from the top edge."""
        return TOP + (1 - self.y.place(value)) * self.inner[1]


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str = "step",
    x_range: tuple[float, float] | None = None,
    x_scale: Scale | None = None,
    y_scale: Scale | None = None,
    log: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    levels: Sequence[tuple[float, str]] = (),
    size: tuple[int, int] = SIZE,
) -> str:
    """Draws curves over an axis of whole numbers.

    Args:
        series: Curves to draw, the last on top.
        label: Description of the chart for screen readers.
        x_label: Name of the horizontal axis.
        x_range: Both ends of the horizontal axis; by default those of the curves.
        x_scale: Scale of the horizontal axis, used instead of `x_range`.
        y_scale: Scale of the vertical axis; by default one that holds the curves.
        log: Whether the vertical axis is logarithmic; numbers that are not above 0 then leave gaps.
        marks: (x, text) of each vertical line.
        levels: (y, text) of each horizontal line.
        size: Width and height of the chart in pixels.

    Returns:
        An `<svg>` element, or an empty string if nothing can be drawn.
    """
    curves = [(one, thin(one)) for one in series if len(one.x)]
    found = [value for _, curve in curves for value in (*curve.low.tolist(), *curve.high.tolist())]
    y_range = finite_range(found, log)
    if y_range is None:
        return ""
    ends = x_range or (min(float(one.x[0]) for one, _ in curves), max(float(one.x[-1]) for one, _ in curves))
    frame = Frame(
        x_scale or linear_scale(*ends, whole=True),
        y_scale or (log_scale(*y_range) if log else linear_scale(*y_range)),
        size,
    )
    parts = [_axes(frame, x_label), *_levels(frame, levels)]
    for x, text in marks[-MOST_MARKS:]:
        line = f"M{frame.across(x):.1f} {TOP}v{frame.inner[1]}"
        parts.append(f'<path class="mark" d="{line}"><title>{plain(text)}</title></path>')
    parts += [_curve(frame, one, curve, log) for one, curve in curves]
    parts += _hovers(frame, [one for one, _ in curves], x_label)
    return _svg(label, parts, size)


def chart_card(title: str, note: str, series: Sequence[Series], wide: bool = False, **options: Any) -> str:
    """Returns a panel with a line chart and its legend; an empty string if nothing can be drawn.

    Args:
        title: Name of the chart.
        note: Sentence about what the chart shows.
        series: Curves of the chart, the last on top.
        wide: Whether the panel stands alone in its row.
        options: Other arguments of `line_chart`, by name.
    """
    chart = line_chart(series, label=f"{title}. {note}", size=WIDE if wide else SIZE, **options)
    named = any(one.name for one in series)
    return panel(title, note, chart and (legend_of(series) if named else "") + chart, wide)


def bar_chart(
    categories: Sequence[str], groups: Sequence[tuple[str, int, Sequence[float]]], *, label: str, x_label: str
) -> str:
    """Draws bars side by side, from 0.

    Args:
        categories: Names of the categories along the horizontal axis.
        groups: (name, colour, one number per category) of each group of bars; a NaN has no bar.
        label: Description of the chart for screen readers.
        x_label: Name of the horizontal axis.

    Returns:
        An `<svg>` element, or an empty string if there is no number.
    """
    y_range = finite_range([value for _, _, values in groups for value in values])
    if y_range is None:
        return ""
    frame = Frame(Scale(0, len(categories), ()), linear_scale(min(0.0, y_range[0]), max(0.0, y_range[1])))
    parts = [_axes(frame, x_label), *_categories(frame, categories)]
    width = frame.inner[0] / len(categories)
    bar = width * 0.76 / len(groups)
    zero = frame.down(0)
    for place, category in enumerate(categories):
        for index, (name, colour, values) in enumerate(groups):
            if finite_range([values[place]]) is None:
                continue
            y = frame.down(values[place])
            parts.append(
                f'<rect class="bar f{colour}" x="{frame.across(place) + width * 0.12 + index * bar:.1f}" '
                f'y="{min(y, zero):.1f}" width="{max(bar - 1, 1):.1f}" height="{max(abs(y - zero), 0.5):.1f}">'
                f"<title>{plain(f'{category}, {name}: {number(values[place])}')}</title></rect>"
            )
    return _svg(label, parts)


@dataclass(frozen=True)
class Spread:
    """The values of one category of a `spread_chart`.

    Args:
        name: Name of the category, shown below the axis.
        mean: Mean of the category's values.
        values: Single values of the category, at least one.
        ends: Both ends of the mean's interval; None without an interval.
        colour: Number of a colour in the palette, 1 to 6.
    """

    name: str
    mean: float
    values: Sequence[float]
    ends: tuple[float, float] | None = None
    colour: int = 1


def spread_chart(
    spreads: Sequence[Spread], *, label: str, x_label: str, y_scale: Scale, levels: Sequence[tuple[float, str]] = ()
) -> str:
    """Draws the mean of each category with its interval, and the single values beside it, as an `<svg>` element.

    Args:
        spreads: Categories along the horizontal axis, from left to right.
        label: Description of the chart for screen readers.
        x_label: Name of the horizontal axis.
        y_scale: Scale of the vertical axis; an interval that reaches beyond it is cut off.
        levels: (y, text) of each horizontal line.
    """
    frame = Frame(Scale(0, len(spreads), ()), y_scale)
    parts = [_axes(frame, x_label), *_levels(frame, levels), *_categories(frame, [one.name for one in spreads])]
    for place, one in enumerate(spreads):
        x = frame.across(place + 0.5)
        if one.ends is not None:
            inside = [min(max(end, y_scale.low), y_scale.high) for end in one.ends]
            line = f"M{x:.1f} {frame.down(inside[0]):.1f}V{frame.down(inside[1]):.1f}"
            bars = [f"M{x - 4:.1f} {frame.down(end):.1f}h8" for end in one.ends if end in inside]
            parts.append(f'<path class="spread s{one.colour}" d="{line}{"".join(bars)}"/>')
        marker = f"M{x:.1f} {frame.down(one.mean):.1f}{MARKERS[one.colour - 1]}"
        values = ", ".join(map(number, one.values))
        title = plain(f"{one.name}: {number(one.mean)} ({values})")
        parts.append(f'<path class="dots f{one.colour}" d="{marker}"><title>{title}</title></path>')
        step = min(5.0, (frame.inner[0] / len(spreads) / 2 - 11) / len(one.values))
        beside = [f"M{x + 10 + step * index:.1f} {frame.down(value):.1f}" for index, value in enumerate(one.values)]
        parts.append(f'<path class="seed" d="{"".join(point + SEED for point in beside)}"/>')
    return _svg(label, parts)


def keys_of(series: Sequence[Series]) -> list[Key]:
    """Returns the legend entries of curves, strong ones first."""
    return [(one.name, _line_key(one)) for one in sorted(series, key=lambda one: one.faint)]


def colour_key(name: str, colour: int) -> Key:
    """Returns the legend entry of a bar or a band."""
    return name, f'<rect class="f{colour}" x="6" y="0.5" width="14" height="9"/>'


def seed_key(name: str) -> Key:
    """Returns the legend entry of the single values beside a mean."""
    return name, f'<path class="seed" d="M13 5{SEED}"/>'


def marker_key(name: str, colour: int) -> Key:
    """Returns the legend entry of a mean."""
    return name, f'<path class="dots f{colour}" d="M13 5{MARKERS[colour - 1]}"/>'


def _line_key(one: Series) -> str:
    marker = "" if one.faint else f'<path class="dots f{one.colour}" d="M13 5{MARKERS[one.colour - 1]}"/>'
    return f'<path class="{_classes(one)}" d="M1 5h24"/>{marker}'


def legend(keys: Sequence[Key]) -> str:
    """Returns legend entries as an HTML list."""
    items = [
        f'<li><svg class="key" viewBox="0 0 26 10" aria-hidden="true">{drawn}</svg>{plain(name)}</li>'
        for name, drawn in keys
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def legend_of(series: Sequence[Series]) -> str:
    """Returns the legend of a line chart as an HTML list, strong curves first."""
    return legend(keys_of(series))


@dataclass(frozen=True)
class Plate:
    """One chart of a figure.

    Args:
        title: Name of the chart, shown above it.
        chart: `<svg>` element from a function of this module, or an empty string.
        keys: Legend entries of this chart alone.
    """

    title: str
    chart: str
    keys: Sequence[Key] = ()


def figure(
    title: str, plates: Sequence[Plate], *, columns: int, keys: Sequence[Key] = (), size: tuple[int, int] = SIZE
) -> str:
    """Returns charts as one SVG file, which contains its background and colours.

    Args:
        title: Title of the figure: what all charts show.
        plates: Charts, row by row; plates without a chart are left out.
        columns: Largest number of charts side by side.
        keys: Legend entries that all charts share.
        size: Width and height of each chart in pixels.
    """
    plates = [plate for plate in plates if plate.chart]
    columns = max(1, min(columns, len(plates)))
    width = EDGE + columns * (size[0] + EDGE)
    lines = textwrap.wrap(title, (width - 2 * EDGE) // TITLE_LETTER)
    parts = [
        f'<text class="title" x="{EDGE}" y="{28 + 20 * line}">{plain(text)}</text>' for line, text in enumerate(lines)
    ]
    shared, y = _key_lines(keys, EDGE, 26 + 20 * len(lines), width - 2 * EDGE)
    parts += shared
    for first in range(0, len(plates), columns):
        row = plates[first : first + columns]
        below = y
        for place, plate in enumerate(row):
            x = EDGE + place * (size[0] + EDGE)
            parts.append(f'<text class="name" x="{x}" y="{y + 14}">{plain(plate.title)}</text>')
            own, end = _key_lines(plate.keys, x, y + 30, size[0])
            parts += own
            below = max(below, end if plate.keys else y + 22)
        for place, plate in enumerate(row):
            parts.append(f'<g transform="translate({EDGE + place * (size[0] + EDGE)} {below})">{plate.chart}</g>')
        y = below + size[1] + EDGE
    style = f":root {{\n{LIGHT}}}\n{CHART_STYLE}{FIGURE_STYLE}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}">'
        f'<style>{style}</style><rect class="ground" width="{width}" height="{y}"/>{"".join(parts)}</svg>\n'
    )


def _key_lines(keys: Sequence[Key], left: float, top: float, width: float) -> tuple[list[str], int]:
    """Returns a legend as SVG, broken into lines at 7 pixels per letter, and the vertical position below it."""
    parts, x, y = [], left, top
    for name, drawn in keys:
        needed = 32 + 7 * len(name) + 14
        if x > left and x + needed > left + width:
            x, y = left, y + 17
        parts.append(
            f'<g transform="translate({x:.0f} {y - 9:.0f})">{drawn}</g>'
            f'<text class="keys" x="{x + 32:.0f}" y="{y:.0f}">{plain(name)}</text>'
        )
        x += needed
    return parts, round(y + 12 if keys else top - 6)


def _svg(label: str, parts: Sequence[str], size: tuple[int, int] = SIZE) -> str:
    width, height = size
    return (
        f'<svg class="chart" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{plain(label)}">{"".join(parts)}</svg>'
    )


def _categories(frame: Frame, names: Sequence[str]) -> list[str]:
    return [
        f'<text class="tick middle" x="{frame.across(place + 0.5):.1f}" y="{frame.size[1] - BOTTOM + 15}">'
        f"{plain(name)}</text>"
        for place, name in enumerate(names)
    ]


def _levels(frame: Frame, levels: Sequence[tuple[float, str]]) -> list[str]:
    return [
        f'<path class="mark" d="M{LEFT} {frame.down(y):.1f}h{frame.inner[0]}"/>'
        f'<text class="tick end" x="{frame.size[0] - RIGHT}" y="{frame.down(y) - 4:.1f}">{plain(text)}</text>'
        for y, text in levels
        if frame.y.low <= y <= frame.y.high
    ]


def _axes(frame: Frame, x_label: str) -> str:
    parts = []
    width, height = frame.size
    for tick, text in zip(frame.y.ticks, frame.y.labels(), strict=True):
        y = frame.down(tick)
        zero = " zero" if tick == 0 else ""
        parts.append(f'<path class="grid{zero}" d="M{LEFT} {y:.1f}h{frame.inner[0]}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + 3.5:.1f}">{text}</text>')
    for tick, text in zip(frame.x.ticks, frame.x.labels(), strict=True):
        x = frame.across(tick)
        parts.append(f'<path class="grid zero" d="M{x:.1f} {height - BOTTOM}v4"/>')
        parts.append(f'<text class="tick middle" x="{x:.1f}" y="{height - BOTTOM + 15}">{text}</text>')
    middle = (LEFT + width - RIGHT) / 2
    parts.append(f'<text class="tick middle" x="{middle:.0f}" y="{height - 5}">{plain(x_label)}</text>')
    return "".join(parts)


def _classes(one: Series) -> str:
    return f"line s{one.colour}" + (" faint" if one.faint else "") + (" dashed" if one.dashed else "")


def _curve(frame: Frame, series: Series, curve: Thinned, log: bool) -> str:
    parts = []
    runs = list(_runs(frame, curve, log))
    if curve.has_band:
        for run in runs:
            low = curve.low[run] if not log else np.maximum(curve.low[run], frame.y.low)
            there = [
                f"{frame.across(x):.1f} {frame.down(y):.1f}" for x, y in zip(curve.x[run], curve.high[run], strict=True)
            ]
            back = [f"{frame.across(x):.1f} {frame.down(y):.1f}" for x, y in zip(curve.x[run], low, strict=True)]
            parts.append(f'<path class="band f{series.colour}" d="M{"L".join(there + back[::-1])}Z"/>')
    lines, dots = [], []
    for run in runs:
        points = [f"{frame.across(x):.1f} {frame.down(y):.1f}" for x, y in zip(curve.x[run], curve.y[run], strict=True)]
        lines.append(f"M{'L'.join(points)}" if len(points) > 1 else f"M{points[0]}h0")
        dots += points
    parts.append(f'<path class="{_classes(series)}" d="{"".join(lines)}"/>')
    if dots and not series.faint:
        every = 1 if len(dots) <= MOST_DOTS else len(dots) // SOME_DOTS
        markers = "".join(f"M{point}{MARKERS[series.colour - 1]}" for point in dots[::every])
        parts.append(f'<path class="dots f{series.colour}" d="{markers}"/>')
    return "".join(parts)


def _runs(frame: Frame, curve: Thinned, log: bool) -> Iterator[slice]:
    """Yields the parts of a curve that have no gap."""
    shown = np.isfinite(curve.y) & (curve.y <= frame.y.high) & (curve.y >= frame.y.low)
    changes = np.flatnonzero(np.diff(np.concatenate([[False], shown, [False]]).astype(int)))
    for first, end in zip(changes[::2], changes[1::2], strict=True):
        yield slice(int(first), int(end))


def _hovers(frame: Frame, series: Sequence[Series], x_label: str) -> list[str]:
    """Returns invisible strips over the chart; the hover text of each has the values of all curves at one place."""
    leading = [one for one in series if not one.faint] or list(series)
    places = np.unique(np.concatenate([one.x for one in leading]))
    if len(places) > MOST_HOVERS:
        places = places[np.linspace(0, len(places) - 1, MOST_HOVERS).round().astype(int)]
    centres = [frame.across(float(place)) for place in places]
    edges = [LEFT, *((a + b) / 2 for a, b in pairwise(centres)), frame.size[0] - RIGHT]
    strips = []
    for place, (first, end) in zip(places, pairwise(edges), strict=True):
        lines = [f"{x_label} {number(float(place), 9)}"]
        for one in series:
            x, y = _nearest(one.x, one.y, float(place))
            at = "" if x == place else f" ({x_label} {number(x, 9)})"
            lines.append(f"{one.name}: {number(y)}{at}")
        title = "\n".join(map(plain, lines))
        strips.append(
            f'<rect class="hover" x="{first:.1f}" y="{TOP}" width="{max(end - first, 1):.1f}" '
            f'height="{frame.inner[1]}">'
            f"<title>{title}</title></rect>"
        )
    return strips


def _nearest(x: Floats, y: Floats, place: float) -> tuple[float, float]:
    index = int(np.abs(x - place).argmin())
    return float(x[index]), float(y[index])
