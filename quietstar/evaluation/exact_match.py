"""Greedy answers, judged by the task that they are answers to."""

from __future__ import annotations

from collections.abc import Sequence

from quietstar.evaluation.answer_formats import AnswerFormat
from quietstar.evaluation.comparison import SIDES, Comparison, compare
from quietstar.evaluation.completions import batches
from quietstar.evaluation.item_store import Record
from quietstar.evaluation.progress_lines import counted
from quietstar.evaluation.subject import Subject, in_order, seconds_of, think_of, written
from quietstar.evaluation.token_texts import encode
from quietstar.tasks.checking import Checker
from quietstar.tasks.task import Problem


def exact_match(subject: Subject, form: AnswerFormat, problems: Sequence[Problem], checker: Checker) -> Comparison:
    """Greedy answers without examples, judged by the task."""
    settings = subject.settings
    prompts = {problem.id: encode(subject.writer.tokenizer, form.prompt(problem)) for problem in problems}
    fitting = [p for p in problems if len(prompts[p.id]) + settings.max_new_tokens <= subject.context]
    found: dict[str, dict[str, Record]] = {side: {} for side in SIDES}
    for side, thinking in zip(SIDES, (False, True), strict=True):
        waiting: list[tuple[str, Problem]] = []
        for problem in fitting:
            key = subject.key(
                "exact",
                side,
                think_of(settings, thinking),
                settings.max_new_tokens,
                prompts[problem.id],
                problem.answer,
            )
            record = subject.store.get(key)
            if record is None:
                waiting.append((key, problem))
            else:
                found[side][problem.id] = record
        with counted(f"exact match, {form.task.name}, thinking {side}", len(waiting)) as count:
            for batch in batches(waiting, settings.batch_size, lambda item: len(prompts[item[1].id])):
                texts = subject.writer.write(
                    [prompts[problem.id] for _, problem in batch], thinking, settings.max_new_tokens, form.is_complete
                )
                asked = [(p, form.for_checker(one.text)) for (_, p), one in zip(batch, texts, strict=True)]
                for (key, problem), one, verdict in zip(batch, texts, checker.check(asked), strict=True):
                    record = {"metric": "exact", "task": form.task.name, "id": problem.id, "thinking": side}
                    record |= {"correct": verdict.correct, "answer": verdict.answer, **written(one)}
                    subject.store.add(key, record)
                    found[side][problem.id] = record
                count(len(batch))
    off, on = (in_order(fitting, found[side], form) for side in SIDES)
    return compare(
        "exact match",
        form.task.name,
        "Share of problems whose greedy completion without examples has the gold answer as its final answer.",
        [float(row["correct"]) for row in off],
        [float(row["correct"]) for row in on],
        skipped=len(problems) - len(off),
        seed=settings.seed,
        seconds={"off": seconds_of(off), "on": seconds_of(on)},
    )
