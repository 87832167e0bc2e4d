"""Axes hold what they show, thinning loses no extreme, and gaps stay gaps."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quietstar.reporting.charts import (
    MOST_LINES,
    Plate,
    Spread,
    bar_chart,
    figure,
    keys_of,
    legend,
    line_chart,
    seed_key,
    spread_chart,
)
from quietstar.reporting.scales import (
    DASH,
    MINUS,
    MOST_POINTS,
    Series,
    linear_scale,
    log_scale,
    mean_curve,
    number,
    thin,
)

NUMBERS = st.floats(-1e12, 1e12, allow_nan=False)


def series(y: list[float], **options: object) -> Series:
    return Series("curve", np.arange(len(y), dtype=float), np.array(y), **options)


def drawn(svg: str, kind: str) -> list[str]:
    """The paths of a class."""
    root = ElementTree.fromstring(svg)
    return [path.get("d", "") for path in root.iter("path") if kind in path.get("class", "").split()]


@given(NUMBERS, NUMBERS)
def test_a_linear_axis_holds_its_numbers_between_round_ticks(one: float, other: float) -> None:
    low, high = sorted((one, other))
    scale = linear_scale(low, high)
    slack = 1e-6 * (scale.high - scale.low)
    assert scale.low - slack <= low <= high <= scale.high + slack
    assert 2 <= len(scale.ticks) <= 13
    assert list(scale.ticks) == sorted(set(scale.ticks))
    assert -1e-6 <= scale.place(low) <= scale.place(high) <= 1 + 1e-6


@given(st.integers(0, 10**7), st.integers(0, 10**7))
def test_steps_are_whole_numbers(one: int, other: int) -> None:
    low, high = sorted((one, other))
    scale = linear_scale(low, high, whole=True)
    assert all(tick == round(tick) for tick in scale.ticks)
    if low < high:
        assert (scale.low, scale.high) == (low, high)


@given(st.floats(1e-30, 1e30), st.floats(1e-30, 1e30))
def test_a_logarithmic_axis_holds_its_numbers(one: float, other: float) -> None:
    low, high = sorted((one, other))
    scale = log_scale(low, high)
    assert -1e-6 <= scale.place(low) <= scale.place(high) <= 1 + 1e-6
    assert 2 <= len(scale.ticks) <= 12


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.0, 1.0, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-0.013, 0.021, [f"{MINUS}0.02", f"{MINUS}0.01", "0", "0.01", "0.02", "0.03"]),
        (0.0, 3e-6, ["0", "1e-06", "2e-06", "3e-06"]),
        (11_400.0, 13_000.0, ["11k", "11.5k", "12k", "12.5k", "13k"]),
        (1000.0, 1001.0, ["1,000.0", "1,000.2", "1,000.4", "1,000.6", "1,000.8", "1,001.0"]),
    ],
)
def test_labels(low: float, high: float, wanted: list[str]) -> None:
    assert linear_scale(low, high).labels() == wanted


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (1234.0, "1,234"),
        (12_345.0, "12.3k"),
        (-0.01234, f"{MINUS}0.01234"),
        (1.2e-6, "1.2e-06"),
        (0.0, "0"),
        (math.nan, DASH),
        (-math.inf, f"{MINUS}∞"),
    ],
)
def test_numbers(value: float, wanted: str) -> None:
    assert number(value) == wanted


@given(st.integers(0, 10**6), st.integers(MOST_POINTS + 1, 3000), st.floats(0, 1))
def test_thinning_keeps_the_extremes_and_the_mean(seed: int, length: int, missing: float) -> None:
    random = np.random.default_rng(seed)
    y = np.where(random.random(length) < missing, np.nan, random.standard_cauchy(length)).tolist()
    curve = thin(series(y))
    assert len(curve.x) <= MOST_POINTS
    finite = [value for value in y if math.isfinite(value)]
    if finite:
        assert np.nanmin(curve.low) == min(finite)
        assert np.nanmax(curve.high) == max(finite)
    inside = np.isfinite(curve.y)
    margin = 1e-9 * np.maximum(np.abs(curve.low), np.abs(curve.high))
    assert np.all((curve.low - margin <= curve.y)[inside]) and np.all((curve.y <= curve.high + margin)[inside])


def test_a_gap_stays_a_gap() -> None:
    nan = math.nan
    [path] = drawn(line_chart([series([1, 2, nan, nan, 3, nan, 4, 5])], label="x"), "line")
    assert len(re.findall("M", path)) == 3
    assert "h0" in path  # the lonely point is a dot


def test_an_infinite_value_and_a_value_without_logarithm_are_gaps() -> None:
    [path] = drawn(line_chart([series([1, math.inf, 2, 3])], label="x"), "line")
    assert len(re.findall("M", path)) == 2
    [path] = drawn(line_chart([series([1, 0, 10, -1, 100])], label="x", log=True), "line")
    assert len(re.findall("M", path)) == 3


def test_points_lie_where_their_numbers_are() -> None:
    svg = line_chart([series([0.0, 5.0, 10.0])], label="x")
    [path] = drawn(svg, "line")
    points = [tuple(map(float, point.split())) for point in path[1:].split("L")]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x1 > x0
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y1 < y0
    assert drawn(svg, "dots") and not drawn(svg, "band")


def test_spread_and_thinned_curves_have_a_band() -> None:
    spread = Series("curve", np.arange(3.0), np.ones(3), spread=np.full(3, 0.5))
    assert drawn(line_chart([spread], label="x"), "band")
    assert drawn(line_chart([series(list(np.sin(np.arange(5000.0))))], label="x"), "band")


def test_hovering_tells_the_numbers() -> None:
    svg = line_chart([series([0.5, 0.25, 0.125])], label="x")
    titles = [title.text for title in ElementTree.fromstring(svg).iter("title")]
    assert titles == ["step 0\ncurve: 0.5", "step 1\ncurve: 0.25", "step 2\ncurve: 0.125"]


@pytest.mark.parametrize("y", [[], [math.nan] * 3, [math.inf]])
def test_nothing_to_draw_is_no_chart(y: list[float]) -> None:
    assert line_chart([series(y)], label="x") == ""
    assert bar_chart(["a"] * len(y), [("one", 1, y)], label="x", x_label="y") == ""


@pytest.mark.parametrize("y", [[3.0], [0.0, 0.0], [1e300, -1e300], [5e-324, 0.0], [1e-310], [7e15, 7e15 + 2]])
@pytest.mark.parametrize("log", [False, True])
def test_extreme_numbers_do_no_harm(y: list[float], log: bool) -> None:
    svg = line_chart([series(y)], label="x", log=log)
    assert "nan" not in svg and "inf" not in svg
    if svg:
        ElementTree.fromstring(svg)


def test_bars_grow_from_zero() -> None:
    svg = bar_chart(["a", "b", "c"], [("one", 1, [1.0, -2.0, math.nan])], label="x", x_label="y")
    bars = [bar for bar in ElementTree.fromstring(svg).iter("rect") if "bar" in bar.get("class", "")]
    (up, down) = ((float(bar.get("y", "")), float(bar.get("height", ""))) for bar in bars)
    assert down[1] == pytest.approx(2 * up[1], abs=0.3)
    assert up[0] + up[1] == pytest.approx(down[0], abs=0.2)


def test_a_figure_opens_by_itself() -> None:
    """It brings its ground and the colour of all that it draws, and asks for nothing."""
    spreads = [Spread("a", 2.0, [1.0, 3.0], (0.5, 99.0)), Spread("b", 4.0, [4.0], colour=2)]
    dots = spread_chart(spreads, label="x", x_label="y", y_scale=linear_scale(0, 10), levels=[(5.0, "half")])
    curves = [series([1.0, 2.0]), Series("<b>", np.arange(2.0), np.arange(2.0), colour=2)]
    plates = [Plate("one", line_chart(curves, label="x"), keys_of(curves)), Plate("none", ""), Plate("two", dots)]
    svg = figure("<title>", plates, columns=2, keys=[seed_key("a seed")])
    root = ElementTree.fromstring(svg)
    assert {element.tag.partition("}")[0] for element in root.iter()} == {"{http://www.w3.org/2000/svg"}
    style = root.find("{*}style")
    assert style is not None and style.text is not None
    assert not re.search(r"url\(|@import", style.text) and svg.count("http") == 1
    names = set(re.findall(r"var\((--[\w-]+)\)", style.text))
    assert names and all(f"{name}:" in style.text for name in names)
    for kind in {kind for element in root.iter() for kind in element.get("class", "").split()} - {"chart", "hover"}:
        assert re.search(rf"\.{kind}\b", style.text), kind
    assert [text.text for text in root.iter() if text.get("class") == "name"] == ["one", "two"]


def test_an_interval_ends_in_a_bar_unless_it_is_cut_off() -> None:
    spreads = [Spread("a", 5.0, [4.0, 6.0], (2.5, 99.0))]
    svg = spread_chart(spreads, label="x", x_label="y", y_scale=linear_scale(0, 10))
    (interval,) = drawn(svg, "spread")
    low, high = (float(end) for end in re.match(r"M\S+ ([\d.]+)V([\d.]+)M", interval).groups())
    (marker,) = drawn(svg, "dots")
    middle = float(marker.split()[1].partition("m")[0])
    assert low - middle == pytest.approx((middle - high) / 2, abs=0.2)  # 2.5 is half as far from 5 as the axis' end
    assert interval.count("h8") == 1
    (seeds,) = drawn(svg, "seed")
    one, other = (float(y) for y in re.findall(r"M\S+ ([\d.]+)m", seeds))
    assert one - middle == pytest.approx(middle - other, abs=0.2)


def test_the_mean_of_runs_lies_in_their_band() -> None:
    curve = mean_curve("runs", [0, 1], [[1.0, 5.0], [3.0, 6.0], [2.0, 1.0]])
    assert curve.y.tolist() == [2.0, 4.0]
    assert [end.tolist() for end in curve.band] == [[1.0, 1.0], [3.0, 6.0]]
    assert mean_curve("one", [0, 1], [[1.0, 5.0]]).band is None


def test_curves_differ_by_colour_and_marker_also_where_they_have_many_points() -> None:
    for count in (3, 1000):
        curves = [series([float(place)] * count, colour=1 + place) for place in range(MOST_LINES)]
        svg = line_chart(curves, label="x")
        looks = re.findall(r'class="dots f(\d)" d="M\S+ [\d.]+(.*?)(?:M|")', svg)
        assert len(looks) == len({colour for colour, _ in looks}) == len({shape for _, shape in looks}) == 6
        marks = [path.count("M") for path in drawn(svg, "dots")]
        assert all(3 <= mark <= 20 for mark in marks)
        assert [shape for _, shape in looks] == re.findall(r'class="dots f\d" d="M13 5(.*?)"', legend(keys_of(curves)))


def test_names_are_escaped() -> None:
    curve = Series("</title><script>", np.arange(2.0), np.arange(2.0))
    svg = line_chart([curve], label='"><script>', marks=[(1.0, "<b>")])
    assert "<script>" not in svg and "<b>" not in svg
    ElementTree.fromstring(svg)
