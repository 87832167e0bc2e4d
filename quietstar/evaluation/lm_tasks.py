"""Tasks of lm-eval (EleutherAI's language model evaluation harness), with and without thinking.

`lm_eval_tasks` runs them, `comparisons` makes comparisons of lm-eval's numbers, and `aggregation_of` finds the function
with which lm-eval made a number of a task's documents, so that `resampled` can give it an interval.
"""

from __future__ import annotations

import importlib
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from quietstar.errors import ConfigError, DataError
from quietstar.evaluation.item_store import Record
from quietstar.evaluation.settings import is_task_file, read_task
from quietstar.evaluation.subject import Subject, think_of
from quietstar.statistics.comparison import SIDES, Comparison, compare
from quietstar.statistics.intervals import CONFIDENCE, RESAMPLES, Interval

Aggregation = Callable[[Sequence[Any]], float]

FORMAT = 2
"""Version of the records, part of their keys."""


NOT_FINITE = "no finite number on both sides"

MEAN = "mean"

CORPUS = ("bleu", "chrf", "chrf++", "ter")

CORPUS_RESAMPLES = 100
"""Number of bootstrap draws for a corpus metric, each of which reads all texts again; the number that lm-eval uses."""


def lm_eval_tasks(subject: Subject, names: Sequence[str]) -> list[Comparison]:
    """Compares every number that lm-eval gives for its tasks, on the same documents.

    The side that thinks is the model itself, which thinks at every position that lm-eval asks about; the other side is
    its base. A task and side that has been evaluated before is not run again.

    Args:
        subject: Model that is evaluated, with its settings and records.
        names: Names of lm-eval's tasks or groups, or YAML files of tasks.

    Raises:
        ConfigError: lm-eval does not know a task, or cannot run it.
        DataError: lm-eval gives no number for a task.
    """
    found: list[Comparison] = []
    manager = _Tasks(names)
    for name in names:
        sides = {side: _side(subject, name, side, manager) for side in SIDES}
        own = comparisons(sides["off"], sides["on"], subject.settings.think, subject.settings.seed)
        if not own:
            raise DataError(f"lm_eval: the task {name} has no metric with a finite number on both sides")
        found += own
    return found


class _Tasks:
    """lm-eval's index of its own tasks, thousands of files, which is made once, and only where it is needed."""

    def __init__(self, names: Sequence[str]) -> None:
        self._own = not all(map(is_task_file, names))

    @cached_property
    def manager(self) -> Any:
        tasks: Any = importlib.import_module("lm_eval.tasks")
        return tasks.TaskManager(include_defaults=self._own)


def _side(subject: Subject, name: str, side: str, tasks: _Tasks) -> Record:
    settings = subject.settings
    task: Any = read_task(name) if is_task_file(name) else name
    evaluator: Any = importlib.import_module("lm_eval.evaluator")
    adapter: Any = importlib.import_module("lm_eval.models.huggingface")
    version: str = importlib.import_module("lm_eval").__version__
    think = think_of(settings, side == "on")
    key = subject.key("lm_eval", FORMAT, version, task, settings.problems, settings.seed, side, think)
    record = subject.store.get(key)
    if record is not None:
        return record
    model = subject.writer.model if side == "on" else subject.writer.model.base
    start = time.perf_counter()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of options that a loaded model ignores
    try:
        lm = adapter.HFLM(pretrained=model, tokenizer=subject.writer.tokenizer, batch_size=settings.batch_size)
        results = evaluator.simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=tasks.manager,
            limit=settings.problems,
            bootstrap_iters=0,  # the paired intervals are made here
            gen_kwargs={"think": settings.think} if side == "on" else None,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    except (ArithmeticError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"lm_eval: the task {name} cannot be run: {reason}") from error
    record = {"metric": "lm_eval", "task": name, "thinking": side, "seconds": time.perf_counter() - start}
    record |= measured(results)
    subject.store.add(key, record)
    return record


def measured(results: Mapping[str, Any]) -> Record:
    """Returns the part of lm-eval's results that is kept: plain JSON values, from which `comparisons` makes everything.

    Args:
        results: Result of lm-eval's `simple_evaluate`, with samples.
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
    """Compares every number of a task and its subtasks.

    A number that is not finite on one side cannot be compared, and is named on stderr.

    Args:
        off: Record of `measured` without thinking, with `seconds`.
        on: Record of `measured` with thinking, with `seconds`.
        think: Rule of when the thinking side thinks while it generates.
        seed: Seed of the bootstrap draws.
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
    """Returns both sides and their difference; how documents are aggregated; the unit; how many documents are left
    out.
    """
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
    """Returns values by metric and filter, then by document; without metrics that have values JSON cannot hold."""
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
    if metric == "bypass":  # lm-eval's placeholder for no metric
        return False
    return bool(found) and not metric.endswith("_stderr") and isinstance(value, (bool, int, float, np.number))


def _generates(name: str, results: Mapping[str, Any]) -> bool:
    """Returns whether texts are generated for a task, or for all tasks of a group."""
    if name in results["configs"]:
        return bool(results["configs"][name].get("output_type") == "generate_until")
    below = results.get("group_subtasks", {}).get(name, [])
    return bool(below) and all(_generates(one, results) for one in below)


def _size(name: str, results: Mapping[str, Any]) -> int:
    """Returns the number of documents of a task, or of all tasks of a group."""
    if name in results["samples"]:
        return len({sample["doc_id"] for sample in results["samples"][name]})
    return sum(_size(one, results) for one in results.get("group_subtasks", {}).get(name, []))


def aggregation_of(
    config: Mapping[str, Any], place: str, items: Mapping[str, Any], scores: Mapping[str, float]
) -> str | None:
    """Returns the name of the function with which lm-eval makes a metric's number of its documents.

    Args:
        config: Configuration of the lm-eval task.
        place: Metric and filter of the number, `metric,filter`.
        items: Values that the metric keeps of each document.
        scores: Numbers of lm-eval, by metric and filter.

    Returns:
        The first of these that gives lm-eval's number: the function that the task names, the metric's own, or the mean.
        The mean also where lm-eval has no finite number because some documents have none. None where no function
        gives that number, such as for a custom function of the task.
    """
    metric, score = place.partition(",")[0], scores.get(place, math.nan)
    registry: Any = importlib.import_module("lm_eval.api.registry")
    default = registry.get_metric_aggregation(metric)
    given = [one.get("aggregation") for one in config.get("metric_list") or [] if one.get("metric") == metric]
    names: list[str] = [name for name in given if isinstance(name, str)]
    names += [name for name, one in _registry().items() if one is default]
    if not math.isfinite(score):
        return MEAN if names[:1] in ([], [MEAN]) and any(map(is_finite, items.values())) else None
    for name in [*names, MEAN]:
        function = _registered(name)
        try:
            if function is not None and math.isclose(function(list(items.values())), score, rel_tol=1e-6, abs_tol=1e-9):
                return name
        except (ArithmeticError, ValueError, TypeError, IndexError):
            continue
    return None


def resampled(
    name: str, off: Sequence[Any], on: Sequence[Any], seed: int
) -> tuple[Interval, Interval, Interval] | None:
    """Aggregates the documents, and bootstrap draws of as many of them, the same draws on both sides.

    Returns:
        Intervals without thinking, with thinking, and of the difference; None where a draw gives no finite number.
    """
    function, count = _registered(name), len(off)
    if function is None or count < 2:
        return None
    random = np.random.default_rng(seed)
    found = []
    try:
        means = function(off), function(on)
        for _ in range(CORPUS_RESAMPLES if name in CORPUS else RESAMPLES):
            drawn = random.integers(count, size=count).tolist()
            found.append([function([side[one] for one in drawn]) for side in (off, on)])
    except (ArithmeticError, ValueError):  # such as a perplexity that is too large for a number
        return None
    draws = np.array(found, dtype=np.float64)
    columns = [draws[:, 0], draws[:, 1], draws[:, 1] - draws[:, 0]]
    if not np.isfinite(draws).all():
        return None
    points = (float(means[0]), float(means[1]), float(means[1] - means[0]))
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    ends = [np.quantile(column, tails).tolist() for column in columns]
    off_mean, on_mean, change = (
        Interval(point, low, high, count) for point, (low, high) in zip(points, ends, strict=True)
    )
    return off_mean, on_mean, change


def is_finite(value: Any) -> bool:
    """Returns whether a value is a number, neither infinite nor NaN."""
    return isinstance(value, (bool, int, float)) and math.isfinite(value)


def _registry() -> Mapping[str, Aggregation]:
    metrics: Any = importlib.import_module("lm_eval.api.metrics")  # registers them
    assert metrics is not None
    registry: Any = importlib.import_module("lm_eval.api.registry")
    names: Mapping[str, Aggregation] = registry.AGGREGATION_REGISTRY
    return {name: names[name] for name in names}


def _registered(name: str) -> Aggregation | None:
    return _registry().get(name)
