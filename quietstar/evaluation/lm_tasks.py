"""Tasks of lm-eval (EleutherAI's language model evaluation harness), with and without thinking."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from quietstar.errors import ConfigError, DataError
from quietstar.evaluation.comparison import SIDES, Comparison
from quietstar.evaluation.inputs import is_task_file, read_task
from quietstar.evaluation.item_store import Record
from quietstar.evaluation.lm_measures import comparisons, measured
from quietstar.evaluation.subject import Subject, think_of

FORMAT = 2
"""Of the records."""


def lm_eval_tasks(subject: Subject, names: Sequence[str]) -> list[Comparison]:
    """Every number that lm-eval gives for its tasks, on the same documents.

    The side that thinks is the model itself, which thinks at every position that lm-eval asks about; the other is its
    base. A task and side that has been evaluated before is not run again.

    Args:
        subject: What is evaluated.
        names: lm-eval's names of tasks or groups, or YAML files of tasks.

    Raises:
        ConfigError: lm-eval does not know a task, or cannot run it.
        DataError: It gives no number for a task.
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
    except (ArithmeticError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"lm_eval: the task {name} cannot be run: {reason}") from error
    record = {"metric": "lm_eval", "task": name, "thinking": side, "seconds": time.perf_counter() - start}
    record |= measured(results)
    subject.store.add(key, record)
    return record
