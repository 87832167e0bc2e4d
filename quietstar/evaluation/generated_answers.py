"""Measures on answers that the model writes: after sampled chains of thought, with a vote of several, and greedily.

`chain_of_thought` and `exact_match` are read first; the task judges their answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quietstar.errors import DataError
from quietstar.evaluation.answers import STEP_BY_STEP, AnswerFormat
from quietstar.evaluation.item_store import Record, counted, key_of
from quietstar.evaluation.subject import (
    FORMAT,
    Continuation,
    Subject,
    batches,
    effort,
    generated_by,
    in_order,
    none_fits,
    seconds_of,
    think_of,
)
from quietstar.evaluation.token_texts import encode
from quietstar.statistics.candidates import maj_at_k
from quietstar.statistics.comparison import SIDES, Comparison, compare
from quietstar.tasks.checking import Checker
from quietstar.tasks.task import Problem, Verdict

FINAL_TOKENS = 12
"""Number of tokens generated after the conclusion of a chain of thought, as in the authors' script."""


def chain_of_thought(
    subject: Subject, form: AnswerFormat, problems: Sequence[Problem], checker: Checker
) -> list[Comparison]:
    """Measures sampled chains of thought after `Let's think step by step.`, and the vote of several (arXiv 2403.09629,
    4.2).

    The answer is what the model writes, greedily, after the chain and a sentence that asks for it (arXiv 2205.11916,
    section 2.2).
    """
    settings = subject.settings
    tokenizer = subject.writer.tokenizer
    prompts = {p.id: encode(tokenizer, form.prompt(p) + STEP_BY_STEP, p.place or p.id) for p in problems}
    room = settings.max_new_tokens + len(encode(tokenizer, form.conclusion)) + FINAL_TOKENS
    fitting = [problem for problem in problems if len(prompts[problem.id]) + room <= subject.context]
    found: dict[str, dict[str, list[Record]]] = {side: {p.id: [] for p in fitting} for side in SIDES}
    for side, vote in ((side, vote) for vote in range(settings.votes) for side in SIDES):
        thinking, waiting = side == "on", []
        for problem in fitting:
            sampling = [settings.max_new_tokens, FINAL_TOKENS, settings.temperature, settings.seed, vote]
            asked = [form.task.name, problem.id, prompts[problem.id], form.conclusion]
            key = subject.key("cot", FORMAT, side, think_of(settings, thinking), *sampling, *asked)
            record = subject.store.get(key)
            if record is None:
                waiting.append((key, problem))
            else:
                found[side][problem.id].append(record)
        name = f"chain of thought {vote + 1} of {settings.votes}, {form.task.name}, thinking {side}"
        with counted(name, len(waiting)) as count:
            for batch in batches(waiting, settings.batch_size, lambda item: len(prompts[item[1].id])):
                own = [problem for _, problem in batch]
                chains, finals = _chains(subject, form, [prompts[p.id] for p in own], own, thinking, vote)
                for (key, problem), chain, final in zip(batch, chains, finals, strict=True):
                    record = {"metric": "cot", "task": form.task.name, "id": problem.id, "thinking": side, "vote": vote}
                    record |= {"text": chain.text, "final": final.text, **effort(chain, final)}
                    subject.store.add(key, record)
                    found[side][problem.id].append(record)
                count(len(batch))
    return _votes(subject, form, fitting, found, checker, len(problems) - len(fitting))


def _chains(
    subject: Subject,
    form: AnswerFormat,
    prompts: Sequence[list[int]],
    problems: Sequence[Problem],
    thinking: bool,
    vote: int,
) -> tuple[list[Continuation], list[Continuation]]:
    settings, writer = subject.settings, subject.writer
    chains = writer.write(
        prompts,
        thinking,
        settings.max_new_tokens,
        form.is_chain_complete,
        settings.temperature,
        [int(key_of(settings.seed, vote, problem.id)[:15], 16) for problem in problems],
    )
    ending = []
    for problem, chain in zip(problems, chains, strict=True):
        reasoning = form.chain(chain.text)
        ids = encode(writer.tokenizer, form.prompt(problem) + STEP_BY_STEP + reasoning + form.conclusion)
        while reasoning and len(ids) > subject.context - FINAL_TOKENS:  # encoding a generated text can give more tokens
            reasoning = reasoning[: subject.context - FINAL_TOKENS - len(ids)]
            ids = encode(writer.tokenizer, form.prompt(problem) + STEP_BY_STEP + reasoning + form.conclusion)
        ending.append(ids)
    return chains, writer.write(ending, thinking, FINAL_TOKENS, form.is_concluded)


def _judge(form: AnswerFormat, problem: Problem, rows: Sequence[Record], checker: Checker) -> list[Verdict]:
    """Returns the verdicts on the answers of a problem's chains, read again from their texts each time."""
    return checker.check([(problem, form.concluded(row["final"])) for row in rows])


def _votes(
    subject: Subject,
    form: AnswerFormat,
    problems: Sequence[Problem],
    found: dict[str, dict[str, list[Record]]],
    checker: Checker,
    skipped: int,
) -> list[Comparison]:
    settings = subject.settings
    if not problems:
        raise DataError(none_fits(form))
    majority: dict[str, list[float]] = {}
    single: dict[str, list[float]] = {}
    answered: dict[str, list[float]] = {}
    all_rows = {side: [row for problem in problems for row in found[side][problem.id]] for side in SIDES}
    for side in SIDES:
        rows = [found[side][problem.id] for problem in problems]
        verdicts = [_judge(form, problem, own, checker) for problem, own in zip(problems, rows, strict=True)]
        answers = [[verdict.answer for verdict in own] for own in verdicts]
        right = [[verdict.correct for verdict in own] for own in verdicts]
        majority[side] = [maj_at_k(a, r, settings.votes) for a, r in zip(answers, right, strict=True)]
        single[side] = [sum(r) / len(r) for r in right]
        answered[side] = [sum(one is not None for one in a) / len(a) for a in answers]
    common: dict[str, Any] = {
        "skipped": skipped,
        "seed": settings.seed,
        "seconds": {side: seconds_of(all_rows[side]) for side in SIDES},
        "generated": {side: generated_by(all_rows[side]) for side in SIDES},
    }
    how = f'sampled at temperature {settings.temperature:g} after "Let\'s think step by step."'
    return [
        compare(
            f"chain of thought, maj@{settings.votes}",
            form.task.name,
            f"Share of problems whose most frequent answer among {settings.votes} chains of thought {how} is right; "
            "of tied answers each counts its part.",
            majority["off"],
            majority["on"],
            **common,
        ),
        compare(
            "chain of thought, one sample",
            form.task.name,
            f"Share of the chains of thought {how} that end in the right answer.",
            single["off"],
            single["on"],
            **common,
        ),
        compare(
            "chain of thought, has an answer",
            form.task.name,
            f"Share of the same chains of thought that end in any answer, right or wrong: {form.concluding}.",
            answered["off"],
            answered["on"],
            **common,
        ),
    ]


def exact_match(
    subject: Subject, form: AnswerFormat, problems: Sequence[Problem], checker: Checker
) -> list[Comparison]:
    """Measures greedy answers without examples, judged by the task: read strictly, leniently, and whether there is any.

    Exact match is low where a model does not know how an answer is written, whatever else it knows. The other two
    measures tell these cases apart.
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
    """Returns the record of the text after each prompt, by problem."""
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
    """Returns a verdict on each problem's text, read again from the text each time."""
    asked = [
        (problem, form.lenient(problem, row["text"]) if leniently else form.for_checker(row["text"]))
        for problem, row in zip(problems, rows, strict=True)
    ]
    return checker.check(asked)
