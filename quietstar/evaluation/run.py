"""Runs an evaluation: all measures in the order of the report, and the content of `evaluation.json`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from quietstar.config.options import CheckpointOptions
from quietstar.errors import ConfigError, DataError
from quietstar.evaluation.answers import AnswerFormat
from quietstar.evaluation.generated_answers import chain_of_thought, exact_match
from quietstar.evaluation.held_out_text import held_out_nll
from quietstar.evaluation.item_store import ItemStore, fingerprint
from quietstar.evaluation.lm_tasks import lm_eval_tasks
from quietstar.evaluation.settings import Inputs, Settings
from quietstar.evaluation.soft_accuracy import soft_accuracy
from quietstar.evaluation.subject import Subject, Writer, context_of
from quietstar.evaluation.token_texts import token_texts
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.model.think_rule import NO_GATE, parse_think
from quietstar.statistics.comparison import Comparison
from quietstar.tasks.checking import Checker
from quietstar.tasks.task import Problem

VERSION = 1
"""Version of `evaluation.json`."""

ITEMS = "evaluation_items.jsonl"


def evaluate(
    model: QuietStarForCausalLM, tokenizer: PreTrainedTokenizerBase, settings: Settings, inputs: Inputs
) -> list[Comparison]:
    """Measures a model; every item is recorded in `evaluation_items.jsonl` of the output directory as soon as it is
    measured.

    Args:
        model: Thinking model in evaluation mode.
        tokenizer: Tokenizer of the model.
        settings: Settings that have been checked.
        inputs: Problems and text that `prepare` has read.

    Raises:
        ConfigError: The model or its tokenizer cannot do what is asked.
        DataError: No problem fits into the model's context.
    """
    if parse_think(settings.think).rule == "learned" and model.thinking_gate is None:
        raise ConfigError(NO_GATE.format(think=settings.think))
    settings = settings.with_length(None, context_of(model))
    store = ItemStore(settings.output_dir / ITEMS)
    writer = Writer(model, tokenizer, settings.think)
    subject = Subject(writer, token_texts(tokenizer), store, settings, fingerprint(model))
    found: list[Comparison] = []
    try:
        for form, problems in inputs.problems:
            found += _task(subject, form, problems)
        if inputs.text is not None and settings.text is not None:
            found += held_out_nll(subject, inputs.text, settings.text.name)
        found += lm_eval_tasks(subject, settings.lm_eval)
    finally:
        store.close()
    return found


def _task(subject: Subject, form: AnswerFormat, problems: Sequence[Problem]) -> list[Comparison]:
    if not problems:
        raise DataError(f"{form.task.name}: has no held-out problems")
    found: list[Comparison] = []
    metrics = subject.settings.metrics
    with Checker(form.task, timeout=5.0) as checker:
        if "soft" in metrics:
            found.append(soft_accuracy(subject, form, problems))
        if "exact" in metrics:
            found += exact_match(subject, form, problems, checker)
        if "cot" in metrics:
            found += chain_of_thought(subject, form, problems, checker)
    return found


def report(
    checkpoint: str, settings: Settings, inputs: Inputs, found: Sequence[Comparison], environment: dict[str, Any]
) -> dict[str, Any]:
    """Returns the content of `evaluation.json`; files and directories are given by name alone, without their location.

    Args:
        checkpoint: Name of the model.
        settings: Settings of the evaluation.
        inputs: Problems and text that `prepare` has read.
        found: Comparisons that `evaluate` has made.
        environment: Versions, hardware and the command.
    """
    loading = CheckpointOptions.__dataclass_fields__
    shown = {name: _shown(value) for name, value in asdict(settings).items() if name not in loading}
    tasks = {
        form.task.name: {"asked": len(problems), "held_out": total}
        for (form, problems), total in zip(inputs.problems, inputs.total, strict=True)
    }
    return {
        "version": VERSION,
        "checkpoint": checkpoint,
        "settings": shown,
        "tasks": tasks,
        "results": [one.to_json() for one in found],
        "environment": environment | {"command": _nameable(environment["command"])},
    }


def _shown(value: Any) -> Any:
    if isinstance(value, Path):
        return value.resolve().name
    return [Path(one).name for one in value] if isinstance(value, tuple) else value


def _nameable(command: str) -> str:
    """Returns a command line in which absolute paths are replaced by the names of their files."""
    words = []
    for word in shlex.split(command):
        option, equals, value = word.rpartition("=")
        words.append(option + equals + (Path(value).name if value.startswith(("/", "~")) else value))
    return shlex.join(words)
