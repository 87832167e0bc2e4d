"""`evaluation.html`: the results of an evaluation on one page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quietstar.evaluation.comparison import SIDES
from quietstar.evaluation.evaluation_table import HEAD, INTERVALS, excludes_zero, group_table, name_of, results_table
from quietstar.reporting.charts import bar_chart
from quietstar.reporting.page import details, page, panel, panels, section, table
from quietstar.reporting.scales import DASH
from quietstar.reporting.text import visible

Row = Mapping[str, Any]
DIFFICULTY = (
    "Tenths of the tokens by their NLL without thinking, the easiest first. A change that is of no use, such as noise "
    "or predictions that are only sharper, already moves easy and hard tokens in different ways: whether thinking "
    "helps is a matter of the mean over all."
)
SHORT = {"continuation": "contin.", "punctuation": "punct."}
"""Names below the bars of a chart."""
AXES = {"difficulty": "tenth of the tokens, the easiest first"}


def evaluation_page(report: Row, viewer: str | None = None) -> str:
    """The document.

    Args:
        report: What `evaluation.json` holds.
        viewer: Name of the page with the thoughts about the text, in the same directory.
    """
    return page(f"Evaluation of {report['checkpoint']}", _parts(report, viewer))


def _parts(report: Row, viewer: str | None) -> Iterator[str]:
    results = report["results"]
    yield (
        f"<header><h1>Thinking on and off</h1><p class='lede'>{visible(str(report['checkpoint']))}: the same model on "
        f"the same items, with thoughts and without. {INTERVALS} Bold where an interval of the difference excludes 0."
        "</p></header>"
    )
    yield section("Results", [_results(results)])
    for row in results:
        for kind, groups in row["groups"].items():
            yield section(f"{row['metric']} by {kind}", _groups(row, kind, groups), _note(kind))
    if viewer is not None:
        link = f'<p><a href="{visible(viewer)}">What the model thinks at each token of the text</a></p>'
        yield section("Thoughts", [link])
    yield section("What the measures are", _statements(results))
    yield section("How this was measured", [_facts(report)])


def _results(results: Sequence[Row]) -> str:
    rows = [list(map(visible, cells)) for cells in results_table(results)]
    for row, cells in zip(results, rows, strict=True):
        if excludes_zero(row["difference"]):
            cells[-1] = f"<b>{cells[-1]}</b>"
    return table(rows, HEAD, numbers=True)


def _groups(row: Row, kind: str, groups: Sequence[Row]) -> list[str]:
    head = [kind, "n", *HEAD[3:]]
    cells = [list(map(visible, line)) for line in group_table(groups, row["unit"])]
    for group, line in zip(groups, cells, strict=True):
        if excludes_zero(group["difference"]):
            line[-1] = f"<b>{line[-1]}</b>"
    sign = 1 if row["higher_is_better"] else -1
    chart = bar_chart(
        [SHORT.get(group["name"], group["name"].removeprefix("tenth ")) for group in groups],
        [("gain", 1, [sign * group["difference"]["mean"] for group in groups])],
        label=f"Gain from thinking by {kind}",
        x_label=AXES.get(kind, kind),
    )
    note = f"How much lower the {row['metric']} is with thinking, in {row['unit']}; below 0 thinking hurts."
    return [panels([panel("Gain from thinking", note, chart)]), table(cells, head, numbers=True)]


def _note(kind: str) -> str:
    return DIFFICULTY if kind == "difficulty" else ""


def _statements(results: Sequence[Row]) -> list[str]:
    meanings = {(name_of(row), str(row["statement"])): None for row in results}
    counted = [
        [
            name_of(row),
            str(row["of"]),
            f"{row['skipped']:,}",
            f"{row['off']['problems']:,} {row['resampled']}",
            *(f"{row['seconds'][side]:,.1f}" if side in row["seconds"] else "" for side in SIDES),
        ]
        for row in results
    ]
    head = ["measure", "of", "left out: too long", "resampled", "seconds off", "seconds on"]
    return [
        table([list(map(visible, pair)) for pair in meanings], ["measure", "what it is"]),
        table([list(map(visible, row)) for row in counted], head, numbers=True),
    ]


def _facts(report: Row) -> str:
    settings = [[visible(name), visible(_setting(value))] for name, value in report["settings"].items()]
    tasks = [
        [visible(f"problems of {name}"), visible(f"{counts['asked']:,} of {counts['held_out']:,}")]
        for name, counts in report["tasks"].items()
    ]
    machine = [[visible(name), visible(str(value))] for name, value in report["environment"].items()]
    return table(tasks + settings) + details("Versions and hardware", table(machine))


def _setting(value: object) -> str:
    return (", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)) or DASH
