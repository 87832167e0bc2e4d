"""Greedy answers, judged by the task that they are answers to."""

from __future__ import annotations

from collections.abc import Sequence

from quietstar.evaluation.answer_formats import AnswerFormat
from quietstar.evaluation.comparison import SIDES, Comparison, compare
from quietstar.evaluation.completions import batches
from quietstar.evaluation.item_store import Record
from quietstar.evaluation.progress_lines import counted
from quietstar.evaluation.subject import FORMAT, Subject, effort, in_order, seconds_of, think_of
from quietstar.evaluation.token_texts import encode
from quietstar.tasks.checking import Checker
from quietstar.tasks.task import Problem


def exact_match(subject: Subject, form: AnswerFormat, problems: Sequence[Problem], checker: Checker) -> Comparison:
    """Greedy answers without examples, judged by the task."""
    settings = subject.settings
    prompts = {problem.id: encode(subject.writer.tokenizer, form.prompt(problem)) for problem in problems}
    fitting = [p for p in problems if len(prompts[p.id]) + settings.max_new_tokens <= subject.context]
    rows = {side: in_order(fitting, _texts(subject, form, fitting, prompts, side), form) for side in SIDES}
    right = {side: _right(form, fitting, rows[side], checker) for side in SIDES}
    return compare(
        "exact match",
        form.task.name,
        "Share of problems whose greedy completion without examples has the gold answer as its final answer.",
        right["off"],
        right["on"],
        skipped=len(problems) - len(fitting),
        seed=settings.seed,
        seconds={side: seconds_of(rows[side]) for side in SIDES},
    )


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


def _right(form: AnswerFormat, problems: Sequence[Problem], rows: Sequence[Record], checker: Checker) -> list[float]:
    """Of each problem, 1.0 where its text has the right answer; read anew from the text each time."""
    asked = [(problem, form.for_checker(row["text"])) for problem, row in zip(problems, rows, strict=True)]
    return [float(verdict.correct) for verdict in checker.check(asked)]
