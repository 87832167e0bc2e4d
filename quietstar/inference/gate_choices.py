"""The choice of when to think with a gate: candidates, the one to take, and the worth of each.

`ways_to_think` lists the candidates, `choose_way` takes one, `measure_choices` compares each with other ways to think
equally often, and `GateReport` says what came out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quietstar.config.options import Count, Positions, ProperShare, Seed
from quietstar.statistics.intervals import bootstrap_intervals

Array = NDArray[np.float64]

SHARES = (0.05, 0.1, 0.2, 0.5)
"""Shares of the tokens to think at; one candidate threshold is set for about each of them."""
THRESHOLDS = (0.0, 0.01, 0.1)
"""Further candidate thresholds, in nats."""
NEARLY_ALL = 0.95
"""Share of the largest gain of any candidate that the chosen one has to keep."""
BEYOND = 1e9
"""Threshold in nats that no predicted gain reaches."""
DRAWS = 20
"""Number of random choices of positions; the control is the mean over them."""
FEWEST_TEXTS = 6
"""Smallest number of texts for an interval: if all of n texts gain, so does every resample of them, and noise does that
once in 2^n."""

LEAST_GAIN = 1e-3
"""Smallest gain that counts, in nats per token. Neighbouring texts are alike, so an interval over them is a little too
narrow; and less than this is not worth a thought."""


@dataclass(frozen=True)
class FitOptions:
    """Options of `fit_gate`.

    Args:
        positions: Positions to measure gains at: `all`; `every:N`, every N-th position; `entropy:K`, the K positions of
            a text whose next token the model without thought is least sure of (K below 1 is a fraction of the text).
        held_out: Share of the texts that is held out; the table is measured on them.
        seed: Seed of the random split into fitted and held-out texts.
        batch_size: Texts per forward pass.
    """

    positions: Positions = "all"
    held_out: ProperShare = 0.25
    seed: Seed = 0
    batch_size: Count = 8


@dataclass(frozen=True)
class Choice:
    """The gain of thinking at some of the held-out tokens, and of other ways that think at equally many.

    A gain is the mean over all held-out tokens of log p(token), in nats, minus the mean without any thought.

    Args:
        think: Rule of when to think, in the form that `generate` takes.
        share: Share of the held-out tokens that have a thought.
        nll: Mean NLL of all held-out tokens, in nats.
        gain: Gain of this choice, in nats per token.
        low: Lower end of the 95 % bootstrap interval of `gain` over texts; None with too few texts.
        high: Upper end of the 95 % bootstrap interval of `gain` over texts; None with too few texts.
        entropy_gain: Gain of thinking at equally many tokens where the entropy of the prediction without thought is
            largest.
        entropy_threshold: Entropy, in nats, above which these tokens lie; None if they are all tokens or none.
        random_gain: Gain of thinking at equally many random tokens, the mean of several draws.
        best_gain: Gain of thinking at the equally many tokens that gain most, which are known only after their next
            token.
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
        """Whether there is an interval that lies above `LEAST_GAIN` as a whole."""
        return self.low is not None and self.low > LEAST_GAIN


def ways_to_think(predicted: Array) -> dict[str, float]:
    """Returns never, always, and the gate at falling thresholds: the rule as `generate` takes it, and its threshold in
    nats.

    Args:
        predicted: Predicted gains, [n], in nats; about each of `SHARES` of them lies above one threshold, rounded to
            three digits.
    """
    at_shares = [float(f"{np.quantile(predicted, 1 - share):.3g}") for share in SHARES]
    falling = sorted({*at_shares, *THRESHOLDS}, reverse=True)
    return {"never": BEYOND, "always": -BEYOND, **{f"learned>{threshold:g}": threshold for threshold in falling}}


def choose_way(predicted: Array, gain: Array, ways: Mapping[str, float]) -> str:
    """Returns the way that thinks least among those that keep nearly all of the gain; never, if there is no gain.

    It is the best of several, so its gain on these texts is not a measure of its worth: that needs other texts.

    Args:
        predicted: Predicted gains, [n], in nats, by fits that did not see these tokens.
        gain: True gains, [n], in nats.
        ways: Thresholds by rule, from `ways_to_think`.
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
    """Returns the gain of each way to think, and of its controls.

    Args:
        predicted: Gains that the gate predicts, [n], in nats.
        gain: True gains of the same tokens, [n], in nats.
        entropy: Entropy of the prediction without thought, [n], in nats.
        base_nll: NLL of each token without thought, [n], in nats.
        text: Number of the text that each token belongs to, [n]; any integers.
        ways: Thresholds by rule, from `ways_to_think`.
        seed: Seed of the random choices and of the resampled texts.
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
    """Returns intervals of the means of [choices, tokens], resampled by text: tokens of one text are not
    independent.
    """
    names, place = np.unique(text, return_inverse=True)
    if len(names) < FEWEST_TEXTS:
        return [(None, None)] * len(gains)
    sums: Array = np.stack([np.bincount(place, row, len(names)) for row in gains], axis=1).astype(np.float64)
    return [(one.low, one.high) for one in bootstrap_intervals(sums * (len(names) / len(text)), seed=seed)]


@dataclass(frozen=True)
class GateReport:
    """How well a gate predicts gains, and how much gain it keeps, all measured on held-out texts.

    Args:
        fitted_texts: Number of texts that the gate was fitted to.
        fitted_tokens: Number of tokens in the fitted texts.
        texts: Number of held-out texts.
        tokens: Number of tokens in the held-out texts.
        ridge: Ridge penalty that cross-validation on the fitted texts chose.
        r_squared: 1 - squared error / variance of the gains; below 0 the mean would have been the better prediction.
        base_nll: Mean NLL without thoughts, in nats per token.
        talk_nll: Mean NLL with a thought at every token, in nats per token.
        choices: Measured choices: never, always, and the gate at falling thresholds.
        chosen: Rule among `choices` that cross-validation on the fitted texts chose: the fewest thoughts that keep
            nearly all of the gain.
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
        """Gain of thinking at every token, in nats per token."""
        return self.base_nll - self.talk_nll

    @property
    def advised(self) -> Choice:
        """The chosen one if its gain is sure: if the 95 % bootstrap interval over the held-out texts lies above
        `LEAST_GAIN`. Otherwise never: the best of several choices gains a little by chance alone."""
        never, chosen = self._choice("never"), self._choice(self.chosen)
        return chosen if chosen.surely_gains else never

    @property
    def threshold(self) -> float:
        """Threshold of the advised choice, in nats; beyond all predictions if that is never or always."""
        beyond = {"never": BEYOND, "always": -BEYOND}
        think = self.advised.think
        return beyond[think] if think in beyond else float(think.removeprefix("learned>"))

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as plain JSON values."""
        return {"format": 1, "advised": self.advised.think, "mean_gain": self.mean_gain, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        """Returns the table in Markdown, with a line before it on the texts and a line after it with the advice."""
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
        """Returns a gain as a share of the gain of thinking everywhere; in nats if that gains nothing."""
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
