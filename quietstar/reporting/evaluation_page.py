"""The results of an evaluation: `evaluation.html`, one self-contained page, and tables for the terminal.

`evaluation_page` builds the page and `evaluation_text` the text for the terminal, from the same cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quietstar.reporting.charts import bar_chart
from quietstar.reporting.page import details, escaped, facts, header, page, panel, panels, section, table, visible
from quietstar.reporting.scales import DASH, MINUS
from quietstar.statistics.comparison import SIDES

Row = Mapping[str, Any]
SHORT = {"continuation": "contin.", "punctuation": "punct."}
"""Short names of groups, shown below the bars of a chart."""
AXES = {
    "difficulty": "tenth of the tokens, the easiest first",
    "uncertainty": "tenth of the tokens, those the model is surest of first",
}
NOTES = {
    "uncertainty": "Tenths of the tokens by the entropy of the prediction without thinking, the surest first. It does "
    "not look at the token that came."
}
HEAD = ("measure", "of", "n", "thinking off", "thinking on", "on - off", "thinking is")
INTERVALS = (
    "95 % bootstrap intervals; on - off is paired, on the same items, and below 0 where thinking lowers a number. "
    "Thinking is called better or worse where the interval of on - off excludes 0; where thinking changes nothing, one "
    "interval in twenty does so by chance. Where all items have the same value, an interval has no width: it says "
    "nothing of what other items would give."
)


def evaluation_page(report: Row, viewer: str | None = None) -> str:
    """Returns the page as HTML.

    Args:
        report: Content of `evaluation.json`.
        viewer: Name of the page with the thoughts about the text, in the same directory; None if there is none.
    """
    return page(f"Evaluation of {report['checkpoint']}", _parts(report, viewer))


def _parts(report: Row, viewer: str | None) -> Iterator[str]:
    results = report["results"]
    what = f"{report['checkpoint']}: the same model on the same items, with thoughts and without. {INTERVALS}"
    yield header("Thinking on and off", [what])
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
    """Returns cells as HTML, with the last one, the verdict, in bold."""
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
        table(escaped(meanings), ["measure", "what it is"]),
        table(escaped(counted), head, numbers=True),
    ]


def _facts(report: Row) -> str:
    tasks = [(f"problems of {name}", f"{n['asked']:,} of {n['held_out']:,}") for name, n in report["tasks"].items()]
    settings = [(name, _setting(value)) for name, value in report["settings"].items()]
    return facts(tasks + settings) + details("Versions and hardware", facts(report["environment"].items()))


def _setting(value: object) -> str:
    return (", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)) or DASH


def results_table(results: Sequence[Row]) -> list[list[str]]:
    """Returns a row of cells under `HEAD` for each result of `evaluation.json`."""
    return [
        [
            name_of(row),
            str(row["of"]),
            f"{row['n']:,}",
            interval(row["off"], row["unit"]),
            interval(row["on"], row["unit"]),
            interval(row["difference"], row["unit"], signed=True),
            verdict(row["difference"], row["higher_is_better"]),
        ]
        for row in results
    ]


def group_table(groups: Sequence[Row], unit: str, higher_is_better: bool | None = None) -> list[list[str]]:
    """Returns a row of cells for each group of a result: name, n, three intervals, verdict if a direction is given."""
    return [
        [
            group["name"],
            f"{group['n']:,}",
            interval(group["off"], unit),
            interval(group["on"], unit),
            interval(group["difference"], unit, signed=True),
            verdict(group["difference"], higher_is_better),
        ]
        for group in groups
    ]


def direction(row: Row, kind: str) -> bool | None:
    """Returns whether higher is better within groups of a result; None where the result has a caveat about them."""
    better: bool | None = row["higher_is_better"]
    return None if kind in row["caveats"] else better


def name_of(row: Row) -> str:
    """Returns the name of the measure of a result, with its unit."""
    unit = {"share": "%"}.get(row["unit"], row["unit"])
    return f"{row['metric']} ({unit})" if unit else str(row["metric"])


def interval(value: Row, unit: str, signed: bool = False) -> str:
    """Returns a mean and the ends of its interval, if it has one; shares in per cent."""
    ends = [value["mean"], value["low"], value["high"]]
    factor, digits = (100.0, 2) if unit == "share" else (1.0, 4)
    shown = [_number(factor * one, digits, signed) for one in ends if one is not None]
    return shown[0] + (f" [{shown[1]}, {shown[2]}]" if len(shown) == 3 else "")


def verdict(difference: Row, higher_is_better: bool | None) -> str:
    """Returns `better` or `worse` if the interval of a difference excludes 0 and a direction is given; else nothing."""
    low, high = difference["low"], difference["high"]
    if higher_is_better is None or low is None or low <= 0 <= high:
        return ""
    return "better" if (low > 0) == higher_is_better else "worse"


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Returns a table as aligned lines; the first `left` columns are aligned on the left, the others on the right."""
    cells = [list(head), *map(list, rows)]
    sizes = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(size) if place < left else cell.rjust(size)
            for place, (cell, size) in enumerate(zip(row, sizes, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def evaluation_text(report: Row) -> str:
    """Returns the text that the terminal shows of `evaluation.json`."""
    results = report["results"]
    parts = [text_table(HEAD, results_table(results), left=2)]
    for row in results:
        for kind, groups in row["groups"].items():
            head = [f"{row['metric']} by {kind} ({row['unit']})", *HEAD[2:]]
            cells = group_table(groups, row["unit"], direction(row, kind))
            parts.append("\n".join(filter(None, [text_table(head, cells), row["caveats"].get(kind)])))
    statements: dict[tuple[str, str], list[str]] = {}
    for row in results:
        skipped = f" ({row['skipped']:,} left out: {row['skipped_because']})" if row["skipped"] else ""
        statements.setdefault((row["metric"], row["statement"]), []).append(f"{row['of']}{skipped}")
    parts.append("\n".join(f"{metric}, {', '.join(of)}: {what}" for (metric, what), of in statements.items()))
    speeds = {(row["of"], str(row["generated"])): _speed(row) for row in reversed(results) if row["generated"]}
    parts += ["\n".join(reversed(speeds.values()))] if speeds else []  # several measures are of the same texts
    parts.append(INTERVALS)
    return "\n\n".join(parts)


def generated(row: Row, side: str) -> str:
    """Returns the tokens that one side generated, their speed, and the share of them with a thought; else nothing."""
    if side not in row["generated"]:
        return ""
    found = row["generated"][side]
    share = f"thought at {100 * found['thought_at']:.0f} %"
    return f"{found['tokens']:,} tokens, {found['tokens_per_second']:,.1f} a second, {share}"


def _speed(row: Row) -> str:
    sides = "; ".join(f"thinking {side}: {generated(row, side)}" for side in row["generated"])
    return f"generated for {row['metric'].partition(',')[0]}, {row['of']}: {sides}"


def _number(value: float, digits: int, signed: bool) -> str:
    shape = f".{digits}f" if abs(value) < 1e6 else ".4g"
    text = f"{value:+{shape}}" if signed else f"{value:{shape}}"
    return text.replace("-", MINUS)
