"""The paper's accuracy: how probable the gold answer is among all answers of the same form.

`soft_accuracy` is read first; `Allowed` has the tokens of gold answers, and the tokens that count in their places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.errors import ConfigError
from quietstar.evaluation.answers import AnswerFormat
from quietstar.evaluation.item_store import Record, counted
from quietstar.evaluation.subject import Subject, Writer, batches, in_order, pad_right
from quietstar.evaluation.token_texts import Texts, encode
from quietstar.statistics.comparison import Comparison, compare
from quietstar.tasks.task import Problem

LINE_END = "\n"


def soft_accuracy(subject: Subject, form: AnswerFormat, problems: Sequence[Problem]) -> Comparison:
    """Measures the paper's zero-shot accuracy (arXiv 2403.09629, section 4.1; `compute_metrics` of the authors' code).

    For each problem it is the product of the probabilities of the gold answer's tokens, including the line end, after
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
    """Describes the symbols that a token of an answer may spell: how many, and a note where some have several
    digits.
    """
    several = any(len(spelling) > 1 for spelling in allowed.group)
    note = ", some of several digits: not comparable with a tokenizer of single digits" if several else ""
    return f"{len(allowed.group) - 1:,} symbols{note}"


@torch.no_grad()
def _answer_log_probabilities(
    writer: Writer, allowed: Allowed, items: Sequence[AnswerTokens]
) -> tuple[list[float], list[float]]:
    """Returns the probability of each whole answer, without and with thought."""
    ids, mask = pad_right([item.ids for item in items])
    most = max(len(item.positions) for item in items)
    # rows with fewer tokens repeat their last anchor; the repeated prediction is not counted
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


@dataclass(frozen=True)
class AnswerTokens:
    """A prompt with its gold answer and the line end after it.

    Args:
        ids: Token ids of the whole text.
        positions: Positions of the counted answer tokens in `ids`, ascending; the line end is the last.
        groups: Row of `Allowed.member` for each counted token: the symbol that it spells.
    """

    ids: list[int]
    positions: list[int]
    groups: list[int]


class Allowed:
    """The small set over which probabilities are renormalised: every token that spells a symbol, or a line end.

    A token spells the text that it adds, without its leading space, so that `▁C`, ` C` and `C` spell the same. The
    probability of a symbol is that of all tokens that spell it. Where a tokenizer has tokens of several digits, each
    number that is one token is a separate symbol.

    Args:
        form: Format that says what a token of an answer may spell.
        texts: Texts of all tokens of the tokenizer.
        banned: Ids of the tokens that the model never writes.

    Attributes:
        ids: int64 [A], the allowed tokens.
        member: bool [G, A], which of the allowed tokens spell each of the G symbols.
        group: Row of `member` by spelling.

    Raises:
        ConfigError: No token is a line end, or none spells a symbol.
    """

    def __init__(self, form: AnswerFormat, texts: Texts, banned: tuple[int, ...] = ()) -> None:
        self._form = form
        self._texts = texts
        spelt = {
            token: spelling
            for token, text in texts.items()
            if token not in banned
            and ((spelling := text.lstrip(" ")) == LINE_END or form.symbols.fullmatch(spelling) is not None)
        }
        self.group = {spelling: place for place, spelling in enumerate(sorted(set(spelt.values())))}
        if LINE_END not in self.group or len(self.group) < 2:
            what = "one of the answer's symbols" if LINE_END in self.group else "a line end"
            raise ConfigError(
                f"tokenizer: no token spells {what} by itself, so {form.task.name} has no soft accuracy with it; "
                "leave out the metric soft"
            )
        self.ids = torch.tensor(sorted(spelt))
        self.member = torch.zeros(len(self.group), len(spelt), dtype=torch.bool)
        for place, token in enumerate(sorted(spelt)):
            self.member[self.group[spelt[token]], place] = True

    def find(self, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, place: str) -> AnswerTokens:
        """Returns the tokens of `prompt + " " + answer + "\\n"`, encoded as a whole, and which of them are counted.

        Tokens without any symbol (a minus, a decimal point) are given, not counted, as in the authors' code.

        Raises:
            ConfigError: A token joins the answer with something else.
            DataError: The tokenizer cannot encode it.
        """
        ids = encode(tokenizer, f"{prompt} {answer}{LINE_END}", place)
        remaining, positions, groups = answer + LINE_END, [], []
        for position in range(len(ids) - 1, -1, -1):
            spelling = self._texts.get(ids[position], "").lstrip(" ")
            if not remaining.endswith(spelling):
                break
            remaining = remaining.removesuffix(spelling)
            if spelling in self.group:
                positions.append(position)
                groups.append(self.group[spelling])
            elif self._form.any_symbol.search(spelling):
                break
            if not remaining:
                return AnswerTokens(ids, positions[::-1], groups[::-1])
        pieces = [self._texts.get(token, "") for token in ids[-len(answer) - 2 :]]
        raise ConfigError(
            f"tokenizer: writes the answer {answer!r} of {place} and a line end as {pieces}, needs tokens that hold "
            "nothing else; leave out the metric soft"
        )

    def log_probability(self, logits: Tensor, groups: Tensor) -> Tensor:
        """Returns log-probabilities of symbols after renormalising over the allowed tokens.

        Args:
            logits: float32 [N, V], logits or log-probabilities.
            groups: int64 [N], row of `member` for each symbol.

        Returns:
            float64 [N].
        """
        allowed = logits[:, self.ids.to(logits.device)].double()
        member = self.member.to(logits.device)[groups]
        return allowed.masked_fill(~member, -torch.inf).logsumexp(-1) - allowed.logsumexp(-1)
