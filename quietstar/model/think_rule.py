"""Where to think: the rule that the argument `think` of `generate` names."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from quietstar.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from quietstar.model.thinking_model import ThinkingModel

FORMS = "always, never, entropy>x (x in nats), every:n, learned or learned>x (x in nats)"
NO_GATE = (
    "think: got {think!r}, but this model has no learned gate; `python -m quietstar.gate CHECKPOINT --text FILE "
    "--out DIRECTORY` fits one, and entropy>x needs none"
)


@dataclass(frozen=True)
class ThinkRule:
    """A rule for which new tokens are thought about.

    Args:
        rule: Name of the rule: `always`, `never`, `every` (every `value`-th new token, the first included), `entropy`
            (the base prediction has an entropy above `value` nats), `learned` (the gate predicts a gain above `value`
            nats).
        value: Parameter of `every` (a count), `entropy` and `learned` (thresholds in nats); the others have none.
    """

    rule: Literal["always", "never", "every", "entropy", "learned"]
    value: float = 0.0

    @property
    def needs_base(self) -> bool:
        """Whether the base prediction has to be known before the rule can decide."""
        return self.rule in ("entropy", "learned")

    def at(self, index: int) -> bool:
        """Return whether the index-th new token, from 0, may be thought about, as far as this depends on its place."""
        if self.rule == "every":
            return index % int(self.value) == 0
        return self.rule != "never"

    def where(self, model: ThinkingModel, hidden_base: Tensor, base_logits: Tensor | None) -> Tensor:
        """Return the rows that are thought about, bool [B].

        Args:
            model: Thinking model, whose gate decides where the rule is `learned`.
            hidden_base: Hidden states that predict the next token of each row, [B, E].
            base_logits: Logits of these predictions, [B, V]; needed only where the rule is `entropy`.
        """
        if self.rule == "entropy":
            assert base_logits is not None
            logprobs = base_logits.log_softmax(-1)
            return -(logprobs.exp() * logprobs).sum(-1) > self.value
        if self.rule == "learned":
            assert model.thinking_gate is not None  # checked before anything is generated
            predicted: Tensor = model.thinking_gate(hidden_base)
            return predicted > self.value
        return hidden_base.new_ones(len(hidden_base)).bool()


def parse_think(think: object, threshold: float = 0.0) -> ThinkRule:
    """Parse the argument `think` of `generate`.

    Args:
        think: Argument of `generate`, such as `always`, `every:4` or `entropy>1.0`.
        threshold: Threshold in nats of `learned` without a number.

    Raises:
        ConfigError: The argument does not name a rule.
    """
    problem = f"think: got {think!r}, needs one of {FORMS}"
    if not isinstance(think, str):
        raise ConfigError(problem)
    text = "".join(think.split())
    if text in ("always", "never", "learned"):
        return ThinkRule(text, threshold if text == "learned" else 0.0)  # type: ignore[arg-type]  # mypy does not narrow a str by "in"
    if match := re.fullmatch(r"every:(\d+)", text):
        if int(match[1]) < 1:
            raise ConfigError(f"think: got {think!r}, every:n needs an n of at least 1")
        return ThinkRule("every", int(match[1]))
    if match := re.fullmatch(r"(entropy|learned)>(.+)", text):
        try:
            value = float(match[2])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ConfigError(f"think: got {think!r}, {match[1]}>x needs a number of nats for x")
        return ThinkRule("entropy" if match[1] == "entropy" else "learned", value)
    names = ("always", "never", "entropy>1.0", "every:4", "learned")
    closest = difflib.get_close_matches(text, names, n=1)
    raise ConfigError(problem + (f"; did you mean {closest[0]}?" if closest else ""))
