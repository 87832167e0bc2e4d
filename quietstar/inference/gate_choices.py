"""Ways to think with a gate: which one to take, and what each is worth against other ways to think as often."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quietstar.config.options import Count, Positions, ProperShare
from quietstar.statistics.intervals import bootstrap_intervals

Array = NDArray[np.float64]

SHARES = (0.05, 0.1, 0.2, 0.5)
"""Of the tokens: there is a threshold for about each of these,"""
THRESHOLDS = (0.0, 0.01, 0.1)
"""and these, in nats."""
NEARLY_ALL = 0.95
"""Of the largest gain of any choice: what the one that is taken keeps at least."""
BEYOND = 1e9
"""Nats that no prediction comes to."""
DRAWS = 20
"""Random choices of positions that the control is the mean of."""
FEWEST_TEXTS = 6
"""For an interval: where all of n texts gain, so does every resample of them, and noise does that once in 2^n."""


LEAST_GAIN = 1e-3
"""Nats per token. Neighbouring texts are alike, so an interval over them is a little too narrow; and less than this is
not worth a thought."""


@dataclass(frozen=True)
class FitOptions:
    """How `fit_gate` fits.

    Args:
        positions: Where to look at gains.
        held_out: Share of the texts that the table is measured on.
        seed: Seed of the split into fitted and held-out texts.
        batch_size: Texts at once.
    """

    positions: Positions = "all"
    held_out: ProperShare = 0.25
    seed: int = 0
    batch_size: Count = 8


@dataclass(frozen=True)
class Choice:
    """Thinking at some of the held-out tokens, and what others gain that choose as many. Gains are means over all
    held-out tokens, in nats, of log p(token) against never thinking.

    Args:
        think: As `generate` takes it.
        share: Of the tokens, thought at.
        nll: Mean NLL of all tokens.
        gain: Of this choice.
        low: Where the 95 % bootstrap interval of `gain` over texts begins; None with too few texts.
        high: Where it ends.
        entropy_gain: Of as many tokens where the prediction without thought is least sure.
        entropy_threshold: The entropy in nats above which these are; None where that is all of them.
        random_gain: Of as many tokens drawn at random, the mean of several draws.
        best_gain: Of the tokens that gain most, which nobody knows before their next token.
    """

    think: str
    share: float
    nll: float
    gain: float
    low: float | None
    high: float | None
    entropy_gain: float
    entropy_threshold: float | None
    random_gain: float
    best_gain: float

    @property
    def surely_gains(self) -> bool:
        """Whether there is an interval and all of it is above `LEAST_GAIN`."""
        return self.low is not None and self.low > LEAST_GAIN


def ways_to_think(predicted: Array) -> dict[str, float]:
    """never, always, and the gate at falling thresholds: what `generate` takes, and the threshold in nats.

    Args:
        predicted: [n] gains in nats, of which about each of `SHARES` is above a threshold of three digits.
    """
    at_shares = [float(f"{np.quantile(predicted, 1 - share):.3g}") for share in SHARES]
    falling = sorted({*at_shares, *THRESHOLDS}, reverse=True)
    return {"never": BEYOND, "always": -BEYOND, **{f"learned>{threshold:g}": threshold for threshold in falling}}


def choose_way(predicted: Array, gain: Array, ways: Mapping[str, float]) -> str:
    """The way that thinks least of those that keep nearly all that can be kept; never, where nothing can.

    It is the best of several, so what it gains here is no measure of it: that takes other texts.

    Args:
        predicted: [n] gains in nats, by fits that did not see these tokens.
        gain: [n] true ones.
        ways: Of `ways_to_think`.
    """
    gains = {think: float(gain[predicted > threshold].sum()) for think, threshold in ways.items()}
    most = max(gains.values())
    keeping = [think for think in ways if gains[think] >= NEARLY_ALL * most]
    return min(keeping, key=lambda think: int((predicted > ways[think]).sum()))


def measure_choices(
    predicted: Array,
    gain: Array,
    entropy: Array,
    base_nll: Array,
    text: NDArray[np.int64],
    ways: Mapping[str, float],
    seed: int,
) -> tuple[Choice, ...]:
    """What each way is worth.

    Args:
        predicted: [n] gains in nats that the gate predicts, as are the others of the same tokens.
        gain: The true ones.
        entropy: Of the prediction without thought.
        base_nll: Without thought.
        text: The text of each token, any numbers.
        ways: Of `ways_to_think`.
        seed: Of the random choices and the resampled texts.
    """
    count, rng = len(gain), np.random.default_rng(seed)
    shuffles = [rng.permutation(count) for _ in range(DRAWS)]
    by_entropy, by_gain = (np.argsort(-scores, kind="stable") for scores in (entropy, gain))
    chosen = {think: predicted > threshold for think, threshold in ways.items()}
    intervals = _intervals(np.stack([np.where(mask, gain, 0.0) for mask in chosen.values()]), text, seed)

    def choice(think: str, mask: NDArray[np.bool_], low: float | None, high: float | None) -> Choice:
        number = int(mask.sum())
        gained = float(gain[mask].sum()) / count
        return Choice(
            think=think,
            share=number / count,
            nll=float(base_nll.mean()) - gained,
            gain=gained,
            low=low,
            high=high,
            entropy_gain=float(gain[by_entropy[:number]].sum()) / count,
            entropy_threshold=float(entropy[by_entropy[number]]) if 0 < number < count else None,
            random_gain=float(np.mean([gain[order[:number]].sum() for order in shuffles])) / count,
            best_gain=float(gain[by_gain[:number]].sum()) / count,
        )

    return tuple(choice(think, mask, *ends) for (think, mask), ends in zip(chosen.items(), intervals, strict=True))


def _intervals(gains: Array, text: NDArray[np.int64], seed: int) -> list[tuple[float | None, float | None]]:
    """Of the means of [choices, tokens], drawn by text: the tokens of one are not independent."""
    names, place = np.unique(text, return_inverse=True)
    if len(names) < FEWEST_TEXTS:
        return [(None, None)] * len(gains)
    sums: Array = np.stack([np.bincount(place, row, len(names)) for row in gains], axis=1).astype(np.float64)
    return [(one.low, one.high) for one in bootstrap_intervals(sums * (len(names) / len(text)), seed=seed)]


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
