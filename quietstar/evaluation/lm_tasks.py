"""Tasks of lm-eval (EleutherAI's language model evaluation harness), with and without thinking."""

from __future__ import annotations

import importlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from quietstar.errors import ConfigError
from quietstar.evaluation.comparison import SIDES, Comparison, compare
from quietstar.evaluation.item_store import Record
from quietstar.evaluation.subject import Subject


def check_lm_eval(names: Sequence[str]) -> None:
    """Refuses tasks that cannot be run.

    Raises:
        ConfigError: lm-eval is not installed, or a file of a task cannot be read.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("lm_eval: lm-eval is not installed; pip install 'quietstar[eval]'")
    for name in names:
        if _is_file(name):
            _read_task(name)


def lm_eval_tasks(subject: Subject, names: Sequence[str]) -> list[Comparison]:
    """Every number that lm-eval gives for each document of its tasks, on the same documents.

    The side that thinks is the model itself, which thinks at every position that lm-eval asks about; the other is its
    base. A task and side that has been evaluated before is not run again.

    Args:
        subject: What is evaluated.
        names: lm-eval's names of tasks or groups, or YAML files of tasks.

    Raises:
        ConfigError: lm-eval does not know a task, or cannot run it.
    """
    found: list[Comparison] = []
    manager = _Tasks(names)
    for name in names:
        sides = {side: _side(subject, name, side, manager) for side in SIDES}
        found += _comparisons(sides["off"], sides["on"], subject.settings.seed)
    return found


class _Tasks:
    """lm-eval's index of its own tasks, thousands of files, which is made once, and only where it is needed."""

    def __init__(self, names: Sequence[str]) -> None:
        self._own = not all(map(_is_file, names))

    @cached_property
    def manager(self) -> Any:
        tasks: Any = importlib.import_module("lm_eval.tasks")
        return tasks.TaskManager(include_defaults=self._own)


def _side(subject: Subject, name: str, side: str, tasks: _Tasks) -> Record:
    settings = subject.settings
    task: Any = _read_task(name) if _is_file(name) else name
    evaluator: Any = importlib.import_module("lm_eval.evaluator")
    adapter: Any = importlib.import_module("lm_eval.models.huggingface")
    version: str = importlib.import_module("lm_eval").__version__
    key = subject.key("lm_eval", version, task, settings.problems, settings.seed, side, settings.think)
    record = subject.store.get(key)
    if record is not None:
        return record
    model = subject.writer.model if side == "on" else subject.writer.model.base
    start = time.perf_counter()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of all that it is handed a model for
    try:
        lm = adapter.HFLM(pretrained=model, tokenizer=subject.writer.tokenizer, batch_size=settings.batch_size)
        results = evaluator.simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=tasks.manager,
            limit=settings.problems,
            bootstrap_iters=0,  # ours are paired
            gen_kwargs={"think": settings.think} if side == "on" else None,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    except (KeyError, ValueError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"lm_eval: the task {name} cannot be run: {reason}") from error
    record = {"metric": "lm_eval", "task": name, "thinking": side, "seconds": time.perf_counter() - start}
    record["samples"] = {one: _numbers(samples) for one, samples in results["samples"].items()}
    record["fewshot"] = {one: int(count) for one, count in results.get("n-shot", {}).items()}
    subject.store.add(key, record)
    return record


def _numbers(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By metric (and filter, where there are several), then by document; what is no finite number is left out."""
    filters = {sample["filter"] for sample in samples}
    found: dict[str, dict[str, float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            value = sample[metric]
            if isinstance(value, (bool, int, float)) and math.isfinite(value):
                name = metric if len(filters) == 1 else f"{metric} ({sample['filter']})"
                found.setdefault(name, {})[str(sample["doc_id"])] = float(value)
    return found


def _comparisons(off: Record, on: Record, seed: int) -> list[Comparison]:
    found = []
    for task, metrics in off["samples"].items():
        for metric, values in metrics.items():
            other = on["samples"].get(task, {}).get(metric, {})
            shared = [place for place in values if place in other]
            if not shared:
                continue
            pair = [[one[place] for place in shared] for one in (values, other)]
            shares = all(0 <= value <= 1 for side in pair for value in side)
            examples = off["fewshot"].get(task, 0)
            found.append(
                compare(
                    metric,
                    task,
                    f"lm-eval's {metric} of the task {task} with {examples} examples, mean over documents.",
                    *pair,
                    skipped=len(values.keys() | other.keys()) - len(shared),
                    seed=seed,
                    unit="share" if shares else "lm-eval's",
                    seconds={"off": off["seconds"], "on": on["seconds"]},
                )
            )
    return found


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _read_task(name: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"lm_eval: cannot read {name}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"lm_eval: {name} is not valid YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict) or "task" not in content:
        raise ConfigError(f"lm_eval: {name} has no field 'task'; needs the definition of an lm-eval task")
    return content
