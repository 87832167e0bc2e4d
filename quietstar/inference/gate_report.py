"""What a thinking gate is worth on held-out texts, against other ways to choose where to think."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SHARES = (0.05, 0.1, 0.2, 0.5)
"""Of the tokens: the report has a threshold for about each of these,"""
THRESHOLDS = (0.0, 0.01, 0.1)
"""and these, in nats."""
NEARLY_ALL = 0.95
"""Of the largest gain of any choice: what the advised one keeps at least."""
BEYOND = 1e9
"""Nats that no prediction comes to."""
DRAWS = 20
"""Random choices of positions that the control is the mean of."""


@dataclass(frozen=True)
class Choice:
    """Thinking at some of the held-out tokens, and what others gain that choose as many. Gains are means over all
    held-out tokens, in nats, of log p(token) against never thinking.

    Args:
        think: As `generate` takes it.
        share: Of the tokens, thought at.
        nll: Mean NLL of all tokens.
        gain: Of this choice.
        entropy_gain: Of as many tokens where the prediction without thought is least sure.
        entropy_threshold: The entropy in nats above which these are; None where that is all of them.
        random_gain: Of as many tokens drawn at random, the mean of several draws.
        best_gain: Of the tokens that gain most, which nobody knows before their next token.
    """

    think: str
    share: float
    nll: float
    gain: float
    entropy_gain: float
    entropy_threshold: float | None
    random_gain: float
    best_gain: float


@dataclass(frozen=True)
class GateReport:
    """How well a gate predicts gains, and what it keeps of them. All of it is measured on held-out texts.

    Args:
        fitted_texts: Texts that it was fitted to.
        fitted_tokens: Their tokens.
        texts: Held-out texts.
        tokens: Their tokens.
        ridge: Strength that cross-validation on the fitted texts chose.
        r_squared: 1 - squared error / variance of the gains; below 0 the mean would have been the better prediction.
        base_nll: Mean NLL without thoughts, nats.
        talk_nll: Mean NLL with a thought at every token.
        choices: never, always, and the gate's at falling thresholds.
    """

    fitted_texts: int
    fitted_tokens: int
    texts: int
    tokens: int
    ridge: float
    r_squared: float
    base_nll: float
    talk_nll: float
    choices: tuple[Choice, ...]

    @property
    def mean_gain(self) -> float:
        """Of thinking at every token, nats per token."""
        return self.base_nll - self.talk_nll

    @property
    def advised(self) -> Choice:
        """The choice that thinks least of those that keep nearly all that can be kept; never, where nothing can."""
        most = max(choice.gain for choice in self.choices)
        return min((one for one in self.choices if one.gain >= NEARLY_ALL * most), key=lambda one: one.share)

    @property
    def threshold(self) -> float:
        """Of the advised choice, in nats; beyond all predictions where that is never or always."""
        beyond = {"never": BEYOND, "always": -BEYOND}
        think = self.advised.think
        return beyond[think] if think in beyond else float(think.removeprefix("learned>"))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"format": 1, "advised": self.advised.think, "mean_gain": self.mean_gain, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        """The table, in Markdown, between what it is of and what it advises."""
        head = (
            f"{self.tokens} tokens of {self.texts} held-out texts; fitted to {self.fitted_tokens} of "
            f"{self.fitted_texts}, ridge {self.ridge:g}. A thought at every token gains {self.mean_gain:.4f} nats per "
            f"token; R^2 of the gate {self.r_squared:.3f}.\n"
        )
        columns = ("think", "tokens thought at", "NLL", "gain kept", "entropy, as many", "random", "best possible")
        lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for choice in self.choices:
            above = "" if choice.entropy_threshold is None else f" (>{choice.entropy_threshold:.3g})"
            cells = (
                f"`{choice.think}`",
                f"{choice.share:.1%}",
                f"{choice.nll:.4f}",
                self.kept(choice.gain),
                self.kept(choice.entropy_gain) + above,
                self.kept(choice.random_gain),
                self.kept(choice.best_gain),
            )
            lines.append(f"| {' | '.join(cells)} |")
        advice = (
            f'\nWith the fewest thoughts near the most that can be gained: think="{self.advised.think}", '
            f'which think="learned" then means, at {self.advised.share:.1%} of the tokens.'
        )
        return "\n".join([head, *lines, advice])

    def kept(self, gain: float) -> str:
        """A gain as a share of that of thinking everywhere; in nats where that gains nothing."""
        return f"{gain / self.mean_gain:.1%}" if self.mean_gain > 0 else f"{gain:+.4f} nats"


def measure_choices(predicted: Array, gain: Array, entropy: Array, base_nll: Array, seed: int) -> tuple[Choice, ...]:
    """The rows of the report.

    Args:
        predicted: [n] gains in nats that the gate predicts, as are the others of the same tokens.
        gain: The true ones.
        entropy: Of the prediction without thought.
        base_nll: Without thought.
        seed: Of the random choices.
    """
    count, rng = len(gain), np.random.default_rng(seed)
    shuffles = [rng.permutation(count) for _ in range(DRAWS)]
    by_entropy, by_gain = (np.argsort(-scores, kind="stable") for scores in (entropy, gain))

    def choice(think: str, chosen: NDArray[np.bool_]) -> Choice:
        number = int(chosen.sum())
        gained = float(gain[chosen].sum()) / count
        return Choice(
            think=think,
            share=number / count,
            nll=float(base_nll.mean()) - gained,
            gain=gained,
            entropy_gain=float(gain[by_entropy[:number]].sum()) / count,
            entropy_threshold=float(entropy[by_entropy[number]]) if 0 < number < count else None,
            random_gain=float(np.mean([gain[order[:number]].sum() for order in shuffles])) / count,
            best_gain=float(gain[by_gain[:number]].sum()) / count,
        )

    choices = [choice("never", np.zeros(count, bool)), choice("always", np.ones(count, bool))]
    for threshold in sorted({*_thresholds(predicted, SHARES), *THRESHOLDS}, reverse=True):
        choices.append(choice(f"learned>{threshold:g}", predicted > threshold))
    return tuple(choices)


def _thresholds(predicted: Array, shares: Sequence[float]) -> list[float]:
    """Such that about these shares lie above, to three digits: what a user would write."""
    return [float(f"{np.quantile(predicted, 1 - share):.3g}") for share in shares]
