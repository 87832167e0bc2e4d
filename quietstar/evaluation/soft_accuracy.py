"""The paper's accuracy: how probable the gold answer is among all answers of its kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quietstar.evaluation.answer_formats import AnswerFormat
from quietstar.evaluation.answer_tokens import Allowed, AnswerTokens
from quietstar.evaluation.comparison import Comparison, compare
from quietstar.evaluation.completions import Writer, batches, pad_right
from quietstar.evaluation.item_store import Record
from quietstar.evaluation.progress_lines import counted
from quietstar.evaluation.subject import Subject, in_order
from quietstar.tasks.task import Problem


def soft_accuracy(subject: Subject, form: AnswerFormat, problems: Sequence[Problem]) -> Comparison:
    """The paper's zero-shot accuracy (arXiv 2403.09629, 4.1; `compute_metrics` of the authors' code).

    For each problem the product over the gold answer's tokens, the line end included, of their probabilities after
    renormalising over the tokens that spell an answer's symbol or a line end. Everything before a token is the gold
    text. Both sides come from one pass: the prediction without thought, and the one after a greedy thought at each
    position that predicts a counted token.
    """
    writer = subject.writer
    allowed = Allowed(form, subject.texts, writer.model.banned)
    found: dict[str, Record] = {}
    waiting: list[tuple[str, Problem, AnswerTokens]] = []
    for problem in problems:
        place = problem.place or problem.id
        tokens = allowed.find(writer.tokenizer, form.prompt(problem), form.answer(problem), place)
        if len(tokens.ids) > subject.context:
            continue
        key = subject.key("soft", tokens.ids, tokens.positions, tokens.groups, len(allowed.ids))
        record = subject.store.get(key)
        if record is None:
            waiting.append((key, problem, tokens))
        else:
            found[problem.id] = record
    with counted(f"soft accuracy, {form.task.name}", len(waiting)) as count:
        for batch in batches(waiting, subject.settings.batch_size, lambda item: len(item[2].ids)):
            sides = _answer_log_probabilities(writer, allowed, [tokens for _, _, tokens in batch])
            for (key, problem, tokens), off, on in zip(batch, *sides, strict=True):
                record = {"metric": "soft", "task": form.task.name, "id": problem.id, "off": off, "on": on}
                subject.store.add(key, {**record, "answer_tokens": len(tokens.positions)})
                found[problem.id] = record
            count(len(batch))
    rows = in_order(problems, found, form)
    return compare(
        "soft accuracy",
        form.task.name,
        "Mean probability of the gold answer without examples: the product over its tokens and the line end, "
        f"renormalised over the tokens that spell a symbol of an answer ({symbols_of(allowed)}) or a line end, "
        "the text before each given (the paper's accuracy; no answer is sampled); thinking is a greedy thought before "
        "each.",
        [float(row["off"]) for row in rows],
        [float(row["on"]) for row in rows],
        skipped=len(problems) - len(rows),
        seed=subject.settings.seed,
    )


def symbols_of(allowed: Allowed) -> str:
    """How many symbols an answer's token may spell, and whether these are those of other tokenizers."""
    several = any(len(spelling) > 1 for spelling in allowed.group)
    note = ", some of several digits: not comparable with a tokenizer of single digits" if several else ""
    return f"{len(allowed.group) - 1:,} symbols{note}"


@torch.no_grad()
def _answer_log_probabilities(
    writer: Writer, allowed: Allowed, items: Sequence[AnswerTokens]
) -> tuple[list[float], list[float]]:
    """Probability of each whole answer, without and with thought."""
    ids, mask = pad_right([item.ids for item in items])
    most = max(len(item.positions) for item in items)
    # rows with fewer tokens repeat their last anchor, whose second prediction is not counted
    anchors = torch.tensor([[*a, *[a[-1]] * (most - len(a))] for a in ([p - 1 for p in i.positions] for i in items)])
    counts = [len(item.positions) for item in items]
    device = writer.model.head.weight.device
    prediction = writer.model.predict(ids.to(device), mask.to(device), anchors=anchors.to(device))
    groups = torch.tensor([[*item.groups, *[0] * (most - len(item.groups))] for item in items], device=device)
    sides = []
    for logits in (prediction.base_logits, prediction.talk_logits):
        log_probability = allowed.log_probability(logits.flatten(0, 1), groups.flatten()).view(groups.shape)
        sides.append([float(row[:n].sum().exp()) for row, n in zip(log_probability, counts, strict=True)])
    return sides[0], sides[1]
