"""What a thinking gate is worth on held-out texts, and how to think with it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from quietstar.inference.gate_choices import BEYOND, FEWEST_TEXTS, Choice


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
        chosen: That of `choices` which cross-validation on the fitted texts chose: the fewest thoughts of those that
            keep nearly all of what can be gained.
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
    chosen: str

    @property
    def mean_gain(self) -> float:
        """Of thinking at every token, nats per token."""
        return self.base_nll - self.talk_nll

    @property
    def advised(self) -> Choice:
        """The chosen one if it surely gains: if the 95 % bootstrap interval of its gain, over the held-out texts, lies
        above `LEAST_GAIN`. Otherwise never: the best of several choices gains a little by chance alone."""
        never, chosen = self._choice("never"), self._choice(self.chosen)
        return chosen if chosen.surely_gains else never

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
        return "\n".join([head, *lines, f"\n{self._advice()}"])

    def kept(self, gain: float) -> str:
        """A gain as a share of that of thinking everywhere; in nats where that gains nothing."""
        return f"{gain / self.mean_gain:.1%}" if self.mean_gain > 0 else f"{gain:+.4f} nats"

    def _advice(self) -> str:
        chosen, advised = self._choice(self.chosen), self.advised
        if self.chosen == "never":
            reason = "In cross-validation on the fitted texts no choice gains anything."
        else:
            found = f'Cross-validation on the fitted texts chose think="{self.chosen}", which gains {chosen.gain:+.4f}'
            between = (
                f"and fewer than {FEWEST_TEXTS} texts do not tell how surely"
                if chosen.low is None
                else f"95% interval {chosen.low:+.4f} to {chosen.high:+.4f}"
            )
            verdict = "" if chosen.surely_gains else ", which may be chance"
            reason = f"{found} nats per held-out token, {between}{verdict}."
        return f'{reason} So think="learned" means think="{advised.think}", at {advised.share:.1%} of the tokens.'

    def _choice(self, think: str) -> Choice:
        return next(choice for choice in self.choices if choice.think == think)
