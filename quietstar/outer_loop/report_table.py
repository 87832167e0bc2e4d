"""The numbers of a run as cells of a table, for the terminal and the page alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from quietstar.reporting.scales import MINUS

Row = Mapping[str, Any]
Way = tuple[str, str | None]
"""How one of several candidates is chosen: a measure, and the score that it uses."""
MAJORITY: Way = ("maj", None)
PASS: Way = ("pass", None)


def percent(share: float | None) -> str:
    """A share in per cent with one decimal; empty where there is none."""
    return "" if share is None else f"{100 * share:.1f}"


def interval(value: Row, mean: str = "mean") -> str:
    """Per cent with the ends of its interval, where it has one."""
    ends = value.get("low"), value.get("high")
    return percent(value[mean]) + (f" [{percent(ends[0])}, {percent(ends[1])}]" if None not in ends else "")


def difference(value: Row) -> str:
    """The same of a difference, with signs."""
    numbers = [value["mean"], value.get("low"), value.get("high")]
    texts = [f"{100 * one:+.1f}".replace("-", MINUS) for one in numbers if one is not None]
    return texts[0] + (f" [{texts[1]}, {texts[2]}]" if len(texts) == 3 else "")


def excludes_zero(value: Row) -> bool:
    """Whether a difference has an interval that 0 is not in."""
    low, high = value.get("low"), value.get("high")
    return low is not None and high is not None and (low > 0 or high < 0)


def _count(*path: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value: Any = row
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return "" if value is None else f"{value:,}"

    return cell


def _inside(row: Row) -> str:
    built = row.get("built", {})
    shares = [built.get(f"right_inside_{source}") for source in ("sample", "rationalize")]
    return "" if shares == [None, None] else " | ".join(percent(share) or "-" for share in shares)


def _hinted(row: Row) -> str:
    built = row.get("built", {})
    return percent(built["hinted"] / built["kept"]) if built.get("hinted") and built.get("kept") else ""


COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "iteration": lambda row: str(row["iteration"]),
    "held-out accuracy": lambda row: interval(row["held_out"], "accuracy") if "held_out" in row else "",
    "sampled right": lambda row: percent(row.get("sampled", {}).get("accuracy")),
    "solved": _count("sampled", "solved"),
    "newly solved": _count("newly_solved"),
    "lost": _count("lost"),
    "rationalised": _count("rationalized", "solved"),
    "kept": _count("built", "kept"),
    "hinted": _hinted,
    "right inside": _inside,
    "distinct": lambda row: f"{row['distinct']['mean']:.2f}" if row.get("distinct") else "",
    "steps": _count("trained", "steps"),
    "cut off": lambda row: percent(row.get("sampled", {}).get("truncated")),
}
"""Of the iterations: shares in per cent."""
MEANINGS = {
    "held-out accuracy": "greedy, after the iteration, with its 95 % interval over problems",
    "sampled right": "samples of training problems, by the model before the iteration",
    "solved": "training problems with a right sample",
    "rationalised": "failures that came back right with the answer as a hint",
    "hinted": "their share of what was kept",
    "right inside": "share of the kept completions whose every step is right, sampled | rationalised",
    "distinct": "different right solutions of a problem",
    "steps": "of fine-tuning",
    "cut off": "samples that reached the limit of tokens",
}


def explanation(head: Sequence[str]) -> str:
    """What the columns mean."""
    return f"Shares in per cent; {'; '.join(f'{name}: {MEANINGS[name]}' for name in head if name in MEANINGS)}."


def iteration_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Names of the columns that have something to say, and the cells of each iteration."""
    columns = {name: [cell(row) for row in rows] for name, cell in COLUMNS.items()}
    there = {name: cells for name, cells in columns.items() if any(cells)}
    return list(there), [list(cells) for cells in zip(*there.values(), strict=True)]


def way_name(way: Way) -> str:
    """What a way to choose is called."""
    measure, score = way
    if score is None:
        return {"pass": "any of k right (pass@k)", "maj": "majority vote (maj@k)"}.get(measure, measure)
    return f"best by {score}" if measure == "best-of" else f"vote weighted by {score}"


def ways(candidates: Row) -> dict[Way, dict[int, Row]]:
    """The value of each way at each k: any right one, the compared score, the other scores, votes."""
    found: dict[Way, dict[int, Row]] = {}
    for row in candidates["rows"]:
        found.setdefault((row["measure"], row["score"]), {})[row["k"]] = row["value"]
    first: list[Way] = [PASS, ("best-of", candidates.get("compared"))]
    order = {"best-of": 0, "maj": 1, "weighted-vote": 2}
    rest = sorted((way for way in found if way not in first), key=lambda way: order.get(way[0], 3))
    return {way: found[way] for way in first + rest if way in found}


def differences(candidates: Row) -> dict[Way, dict[int, Row]]:
    """Best-of-k of the compared score minus each other way, at each k."""
    found: dict[Way, dict[int, Row]] = {}
    for one in candidates.get("differences", ()):
        found.setdefault((one["measure"], one["other"]), {})[one["k"]] = one["value"]
    order = [way for way in ways(candidates) if way in found]
    return {way: found[way] for way in order}


def ks_of(table: Mapping[Way, Mapping[int, Row]]) -> list[int]:
    """All values of k, ascending."""
    return sorted({k for values in table.values() for k in values})


def grid(
    table: Mapping[Way, Mapping[int, Row]], cell: Callable[[Row], str], name: Callable[[Way], str] = way_name
) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of a table with a row for each way and a column for each k."""
    ks = ks_of(table)
    rows = [[name(way), *(cell(values[k]) if k in values else "" for k in ks)] for way, values in table.items()]
    return ["", *(f"k = {k}" for k in ks)], rows


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts names with numbers in them as people do: 2 digits before 10 digits."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


def printable(text: str) -> str:
    """Text that does nothing to a terminal: names and messages hold what task files and models have written."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """Cells as lines of at most `width` characters; columns that do not fit follow below, with the first one again."""
    head, rows = list(map(printable, head)), [list(map(printable, row)) for row in rows]
    heads = [name.split(" ") if len(name) > 9 and place else [name] for place, name in enumerate(head)]
    tops = [list(line) for line in zip_longest(*(one[::-1] for one in heads), fillvalue="")][::-1]
    sizes = [max(map(len, column)) for column in zip(*tops, *rows, strict=True)]
    blocks: list[list[int]] = [[]]
    for place in range(1, len(sizes)):
        used = sizes[0] + sum(sizes[one] + 2 for one in blocks[-1])
        if blocks[-1] and used + sizes[place] + 2 > width:
            blocks.append([])
        blocks[-1].append(place)
    parts = []
    for block in blocks:
        lines = [
            "  ".join([line[0].ljust(sizes[0]), *(line[place].rjust(sizes[place]) for place in block)]).rstrip()
            for line in [*tops, *rows]
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
