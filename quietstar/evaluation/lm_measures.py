"""lm-eval's numbers as comparisons: aggregated as lm-eval does it, with intervals where that is possible."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from quietstar.evaluation.bootstrap import Interval
from quietstar.evaluation.comparison import Comparison, compare
from quietstar.evaluation.item_store import Record
from quietstar.evaluation.lm_aggregations import MEAN, aggregation_of, is_finite, resampled

NOT_FINITE = "no finite number on both sides"


def measured(results: Mapping[str, Any]) -> Record:
    """What is kept of lm-eval's results: plain JSON values, from which `comparisons` makes all it reports.

    Args:
        results: Of `simple_evaluate`, with samples.
    """
    scores: dict[str, dict[str, float]] = {}
    sizes: dict[str, int] = {}
    for name, values in results["results"].items():
        scores[name] = {place: float(value) for place, value in values.items() if _is_score(place, value)}
        sizes[name] = int(values.get("sample_len") or _size(name, results))
    items = {name: _items(samples) for name, samples in results["samples"].items()}
    return {
        "scores": scores,
        "sizes": sizes,
        "items": items,
        "aggregation": {
            name: {
                place: aggregation_of(results["configs"][name], place, own, scores[name]) for place, own in by.items()
            }
            for name, by in items.items()
        },
        "higher_is_better": {name: dict(own) for name, own in results.get("higher_is_better", {}).items()},
        "fewshot": {name: int(count) for name, count in results.get("n-shot", {}).items()},
        "generates": [name for name in scores if _generates(name, results)],
    }


def comparisons(off: Record, on: Record, think: str, seed: int) -> list[Comparison]:
    """Every number of a task and its subtasks.

    What is no finite number on a side cannot be compared, and is named on stderr.

    Args:
        off: `measured` without thinking, with `seconds`.
        on: With thinking.
        think: When that side thinks while it generates.
        seed: Of the bootstrap.
    """
    found = []
    for name, scores in off["scores"].items():
        several = len({place.partition(",")[2] for place in scores}) > 1
        for place in scores:
            metric, _, rule = place.partition(",")
            shown = f"{metric} ({rule})" if several else metric
            one = _compared(off, on, name, place, seed)
            if one is None:
                print(f"lm_eval: {shown} of {name} is left out: {NOT_FINITE}", file=sys.stderr, flush=True)
                continue
            pair, how, unit, skipped = one
            thought = (
                f"while it writes the model thinks as {think!r} says"
                if name in off["generates"]
                else "there is a thought before each token that is scored"
            )
            found.append(
                Comparison(
                    shown,
                    name,
                    f"lm-eval's {shown} of {name} with {off['fewshot'].get(name, 0)} examples, {how}; {thought}.",
                    unit,
                    pair[0].problems,
                    skipped,
                    *pair,
                    higher_is_better=off["higher_is_better"].get(name, {}).get(metric),
                    skipped_because=NOT_FINITE,
                    resampled="documents",
                    seconds={"off": off["seconds"], "on": on["seconds"]},
                )
            )
    return found


def _compared(
    off: Record, on: Record, name: str, place: str, seed: int
) -> tuple[tuple[Interval, Interval, Interval], str, str, int] | None:
    """Both sides with their difference; how documents are put together; the unit; how many documents are left out."""
    by_document = [side["items"].get(name, {}).get(place, {}) for side in (off, on)]
    aggregation = off["aggregation"].get(name, {}).get(place)
    if aggregation == MEAN and all(by_document):
        shared = [one for one in by_document[0] if all(is_finite(side.get(one)) for side in by_document)]
        if not shared:
            return None
        pair = [[float(side[one]) for one in shared] for side in by_document]
        shares = all(0 <= value <= 1 for side in pair for value in side)
        one = compare("", "", "", *pair, skipped=0, seed=seed)
        unit = "share" if shares else ""
        return (one.off, one.on, one.difference), "mean over documents", unit, len(by_document[0]) - len(shared)
    values = [side["scores"].get(name, {}).get(place) for side in (off, on)]
    if not all(is_finite(value) for value in values):
        return None
    three = None
    if aggregation is not None and by_document[0].keys() == by_document[1].keys():
        items = [[side[one] for one in by_document[0]] for side in by_document]
        three = resampled(aggregation, items[0], items[1], seed)
    if three is None:
        size = off["sizes"][name]
        ends = [Interval(value, None, None, size) for value in (*values, values[1] - values[0])]
        three = ends[0], ends[1], ends[2]
        aggregation = "as lm-eval aggregates it, which leaves no interval"
    else:
        aggregation = f"aggregated over documents by lm-eval's {aggregation}"
    return three, aggregation, "", 0


def _items(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By metric and filter, then by document; without metrics whose values are nothing that JSON has."""
    found: dict[str, dict[str, Any]] = {}
    odd = set()
    for sample in samples:
        for metric in sample["metrics"]:
            place = f"{metric},{sample['filter']}"
            try:
                found.setdefault(place, {})[str(sample["doc_id"])] = _plain(sample[metric])
            except TypeError:
                odd.add(place)
    return {place: own for place, own in found.items() if place not in odd}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(type(value).__name__)


def _is_score(place: str, value: Any) -> bool:
    metric, found, _ = place.partition(",")
    if metric == "bypass":  # lm-eval's stand-in for no metric
        return False
    return bool(found) and not metric.endswith("_stderr") and isinstance(value, (bool, int, float, np.number))


def _generates(name: str, results: Mapping[str, Any]) -> bool:
    """Whether texts are written for a task, or for all below a group."""
    if name in results["configs"]:
        return bool(results["configs"][name].get("output_type") == "generate_until")
    below = results.get("group_subtasks", {}).get(name, [])
    return bool(below) and all(_generates(one, results) for one in below)


def _size(name: str, results: Mapping[str, Any]) -> int:
    """Documents of a task, or of all below a group."""
    if name in results["samples"]:
        return len({sample["doc_id"] for sample in results["samples"][name]})
    return sum(_size(one, results) for one in results.get("group_subtasks", {}).get(name, []))
