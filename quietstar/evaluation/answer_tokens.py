"""The tokens of a gold answer, and what else the model could have written in their places."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.errors import ConfigError
from quietstar.evaluation.answer_formats import AnswerFormat
from quietstar.evaluation.token_texts import Texts, encode

LINE_END = "\n"


@dataclass(frozen=True)
class AnswerTokens:
    """A prompt with its gold answer and the line end behind it.

    Args:
        ids: The whole text.
        positions: Where the counted tokens of the answer stand in `ids`, ascending; the line end is the last.
        groups: What each of them spells: a row of `Allowed.member`.
    """

    ids: list[int]
    positions: list[int]
    groups: list[int]


class Allowed:
    """The small set over which probabilities are renormalised: every token that spells a symbol, or a line end.

    A token spells what it adds to the text without its leading space, so that `▁C`, ` C` and `C` spell the same; the
    probability of a symbol is that of all tokens that spell it. Where a tokenizer has tokens of several digits, each
    number that is one token is a symbol of its own.

    Args:
        form: Says what an answer's token may spell.
        texts: Of the tokenizer.
        banned: Tokens that the model never writes.

    Attributes:
        ids: int64 [A], the allowed tokens.
        member: bool [G, A], which of them spell each of the G symbols.
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
        """The tokens of `prompt + " " + answer + "\\n"`, encoded as a whole, and which of them are counted.

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
        """Log-probability of symbols after renormalising over the allowed tokens.

        Args:
            logits: float32 [N, V], or log-probabilities.
            groups: int64 [N], what is spelt.

        Returns:
            float64 [N].
        """
        allowed = logits[:, self.ids.to(logits.device)].double()
        member = self.member.to(logits.device)[groups]
        return allowed.masked_fill(~member, -torch.inf).logsumexp(-1) - allowed.logsumexp(-1)
