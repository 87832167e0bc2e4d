"""Greedy answers, judged by the task that they are answers to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quietstar.evaluation.answer_formats import AnswerFormat
from quietstar.evaluation.comparison import SIDES, Comparison, compare
from quietstar.evaluation.completions import batches
from quietstar.evaluation.item_store import Record
from quietstar.evaluation.progress_lines import counted
from quietstar.evaluation.subject import FORMAT, Subject, effort, generated_by, in_order, seconds_of, think_of
from quietstar.evaluation.token_texts import encode
from quietstar.tasks.checking import Checker
from quietstar.tasks.task import Problem, Verdict


def exact_match(
    subject: Subject, form: AnswerFormat, problems: Sequence[Problem], checker: Checker
) -> list[Comparison]:
    """Greedy answers without examples, judged by the task: read strictly, leniently, and whether there is any.

    Exact match is low where a model does not know how an answer is written, whatever else it knows. The other two
    measures tell these apart.
    """
    settings = subject.settings
    tokenizer = subject.writer.tokenizer
    prompts = {p.id: encode(tokenizer, form.prompt(p), p.place or p.id) for p in problems}
    fitting = [p for p in problems if len(prompts[p.id]) + settings.max_new_tokens <= subject.context]
    rows = {side: in_order(fitting, _texts(subject, form, fitting, prompts, side), form) for side in SIDES}
    strict = {side: _judged(form, fitting, rows[side], checker) for side in SIDES}
    lenient = {side: _judged(form, fitting, rows[side], checker, leniently=True) for side in SIDES}
    common: dict[str, Any] = {
        "skipped": len(problems) - len(fitting),
        "seed": settings.seed,
        "seconds": {side: seconds_of(rows[side]) for side in SIDES},
        "generated": {side: generated_by(rows[side]) for side in SIDES},
    }
    return [
        compare(
            "exact match",
            form.task.name,
            "Share of problems whose greedy completion without examples gives the gold answer, read strictly: "
            f"{form.strictly}.",
            *([float(one.correct) for one in strict[side]] for side in SIDES),
            **common,
        ),
        compare(
            "exact match, lenient",
            form.task.name,
            f"The same, where a completion without an answer by the strict reading gives {form.leniently}.",
            *([float(one.correct) for one in lenient[side]] for side in SIDES),
            **common,
        ),
        compare(
            "has an answer",
            form.task.name,
            "Share of the same completions that have any answer by the strict reading, right or wrong.",
            *([float(one.answer is not None) for one in strict[side]] for side in SIDES),
            **common,
        ),
    ]


def _texts(
    subject: Subject, form: AnswerFormat, problems: Sequence[Problem], prompts: dict[str, list[int]], side: str
) -> dict[str, Record]:
    """What is written after each prompt, by problem."""
    settings, thinking = subject.settings, side == "on"
    found: dict[str, Record] = {}
    waiting: list[tuple[str, Problem]] = []
    for problem in problems:
        how = [side, think_of(settings, thinking), settings.max_new_tokens]
        key = subject.key("exact", FORMAT, form.task.name, *how, prompts[problem.id])
        record = subject.store.get(key)
        if record is None:
            waiting.append((key, problem))
        else:
            found[problem.id] = record
    with counted(f"exact match, {form.task.name}, thinking {side}", len(waiting)) as count:
        for batch in batches(waiting, settings.batch_size, lambda item: len(prompts[item[1].id])):
            texts = subject.writer.write(
                [prompts[problem.id] for _, problem in batch], thinking, settings.max_new_tokens, form.is_complete
            )
            for (key, problem), one in zip(batch, texts, strict=True):
                record = {"metric": "exact", "task": form.task.name, "id": problem.id, "thinking": side}
                record |= {"text": one.text, **effort(one)}
                subject.store.add(key, record)
                found[problem.id] = record
            count(len(batch))
    return found


def _judged(
    form: AnswerFormat,
    problems: Sequence[Problem],
    rows: Sequence[Record],
    checker: Checker,
    leniently: bool = False,
) -> list[Verdict]:
    """A verdict on each problem's text; read anew from the text each time."""
    asked = [
        (problem, form.lenient(problem, row["text"]) if leniently else form.for_checker(row["text"]))
        for problem, row in zip(problems, rows, strict=True)
    ]
    return checker.check(asked)
