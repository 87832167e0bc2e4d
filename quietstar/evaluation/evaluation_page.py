"""`evaluation.html`: the results of an evaluation on one page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quietstar.evaluation.comparison import SIDES
from quietstar.evaluation.evaluation_table import (
    HEAD,
    INTERVALS,
    direction,
    generated,
    group_table,
    name_of,
    results_table,
)
from quietstar.reporting.charts import bar_chart
from quietstar.reporting.page import details, page, panel, panels, section, table
from quietstar.reporting.scales import DASH
from quietstar.reporting.text import visible

Row = Mapping[str, Any]
SHORT = {"continuation": "contin.", "punctuation": "punct."}
"""Names below the bars of a chart."""
AXES = {
    "difficulty": "tenth of the tokens, the easiest first",
    "uncertainty": "tenth of the tokens, those the model is surest of first",
}
NOTES = {
    "uncertainty": "Tenths of the tokens by the entropy of the prediction without thinking, the surest first. It does "
    "not look at the token that came."
}


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
        f"the same items, with thoughts and without. {INTERVALS}</p></header>"
    )
    yield section("Results", [_results(results)])
    for row in results:
        for kind, groups in row["groups"].items():
            yield section(
                f"{row['metric']} by {kind}",
                _groups(row, kind, groups),
                row["caveats"].get(kind) or NOTES.get(kind, ""),
            )
    if viewer is not None:
        link = f'<p><a href="{visible(viewer)}">What the model thinks at each token of the text</a></p>'
        yield section("Thoughts", [link])
    yield section("What the measures are", _statements(results))
    yield section("How this was measured", [_facts(report)])


def _results(results: Sequence[Row]) -> str:
    return table(list(map(_marked, results_table(results))), HEAD, numbers=True)


def _marked(cells: Sequence[str]) -> list[str]:
    """Cells as HTML, the verdict bold."""
    *shown, last = map(visible, cells)
    return [*shown, f"<b>{last}</b>" if last else ""]


def _groups(row: Row, kind: str, groups: Sequence[Row]) -> list[str]:
    cells = list(map(_marked, group_table(groups, row["unit"], direction(row, kind))))
    chart = bar_chart(
        [SHORT.get(group["name"], group["name"].removeprefix("tenth ")) for group in groups],
        [("on - off", 1, [group["difference"]["mean"] for group in groups])],
        label=f"Change by thinking, by {kind}",
        x_label=AXES.get(kind, kind),
    )
    helps = {True: "; above 0 thinking helps", False: "; below 0 thinking helps", None: ""}[direction(row, kind)]
    note = f"{row['metric']} with thinking minus without, in {row['unit']}{helps}."
    return [panels([panel("On - off", note, chart)]), table(cells, [kind, *HEAD[2:]], numbers=True)]


def _statements(results: Sequence[Row]) -> list[str]:
    meanings = {(name_of(row), str(row["statement"])): None for row in results}
    counted = [
        [
            name_of(row),
            str(row["of"]),
            f"{row['skipped']:,}" + (f" ({row['skipped_because']})" if row["skipped"] else ""),
            f"{row['off']['problems']:,} {row['resampled']}",
            *(f"{row['seconds'][side]:,.1f}" if side in row["seconds"] else "" for side in SIDES),
            *(generated(row, side) for side in SIDES),
        ]
        for row in results
    ]
    head = ["measure", "of", "left out", "resampled", "seconds off", "seconds on", "generated off", "generated on"]
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
