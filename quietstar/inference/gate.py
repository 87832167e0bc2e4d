"""Fits the thinking gate: from texts with thoughts everywhere to a prediction of where thinking pays.

`fit_gate` is read first. `read_gains` measures what thinking gains at each position, and the hidden states that the
gate sees before it. `Moments` and the functions after it are ridge regression from sums over the data, so that any
amount of data needs one pass and E x E numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quietstar.config.options import check
from quietstar.errors import ConfigError, DataError
from quietstar.inference.gate_choices import Array, FitOptions, GateReport, choose_way, measure_choices, ways_to_think
from quietstar.model.heads import ThinkingGate
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.model.padding import Padding, read_padding
from quietstar.model.passes import CachedPass
from quietstar.model.thoughts import ENTROPY_CHUNK

STREAMS = 2048
"""Positions that think at once, to limit the memory; the text is run again for each further batch of positions."""

RIDGE = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 4
FEWEST = 3
"""Least number of texts: two folds, and one held out."""


def fit_gate(
    model: QuietStarForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    positions: str = "all",
    ridge: float | Sequence[float] = RIDGE,
    held_out: float = 0.25,
    seed: int = 0,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> GateReport:
    """Gives a model a gate that predicts, before each thought, how much the thought will gain.

    The target is log p(next token) with a greedy thought minus without, at every position. The fit is ridge regression
    on the text's hidden states, in closed form in float64. It takes one pass with thoughts over the texts, and one
    without over those that are not held out; a token needs two numbers of memory. Cross-validation on the texts that
    are not held out chooses the strength and the predicted gain above which to think.

    The report is on the held-out texts, which nothing is fitted to. They decide one thing: thinking is advised only
    where it surely gains there (`GateReport.advised`); otherwise `think="learned"` means never. A sure gain is not
    always a large one: the report has its size. Texts cut from one document are alike, and make a gain look surer than
    it is for another document.

    Args:
        model: Model that gets the gate, `config.thinking_gate`, and the advised `config.thinking_threshold`; nothing
            else of it changes. An existing gate is replaced.
        input_ids: int64 [N, L], token ids of at least 3 texts; each text is either fitted to or held out.
        attention_mask: [N, L], 1 at tokens and 0 at padding, as in `QuietStarForCausalLM.think`; None for no padding.
        positions: Positions to measure gains at: `all`, `every:N` or `entropy:K`.
        ridge: Strength of the penalty, relative to standardised features; of several the best is taken.
        held_out: Share of the texts to hold out, at least one; with fewer than 6 held-out texts thinking is never
            advised.
        seed: Seed of the split, and of the random choices and resampled texts in the report.
        batch_size: Number of texts per batch.
        progress: Function called with the number of texts that are done, and of all texts.

    Raises:
        ConfigError: An option is out of range.
        DataError: There is too little text, a tensor has a wrong shape, or thoughts change nothing.
    """
    strengths = [ridge] if isinstance(ridge, (int, float)) else list(ridge)
    if not strengths or not all(0 < strength < float("inf") for strength in strengths):
        raise ConfigError(f"ridge: got {strengths}, needs one or more numbers above 0")
    check(FitOptions(positions, held_out, seed, batch_size))
    read_padding(input_ids, attention_mask)  # refuses wrong shapes before any work is done
    folds, held = _split(input_ids, held_out, seed)
    done = 0

    def batches(texts: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        for batch in texts.split(batch_size):
            yield input_ids[batch], None if attention_mask is None else attention_mask[batch]

    def think(texts: Tensor) -> Iterator[tuple[int, Gains]]:
        """Yields the gains of each piece with the number of texts before its batch."""
        nonlocal done
        first = 0
        for ids, mask in batches(texts):
            for gains in read_gains(model, ids, mask, positions=positions):
                yield first, gains
            first, done = first + len(ids), done + len(ids)
            if progress is not None:
                progress(done, input_ids.shape[0])

    def predict(gate: ThinkingGate, texts: Tensor) -> Iterator[Tensor]:
        for ids, mask in batches(texts):
            for hidden in read_states(model, ids, mask, positions=positions):
                yield gate(hidden).double().cpu()

    was_training = model.training
    model.train(False)
    try:
        read = [fold for texts in folds if (fold := _Fold.of(texts, think(texts))) is not None]
        moments = [fold.moments for fold in read]
        strength = _strength(moments, strengths)
        device = model.head.weight.device
        gate = _gate(fit_ridge(add(moments), strength), device)
        others = [_gate(fit, device) for fit in fit_to_others(moments, strength)]
        unseen = [part for other, fold in zip(others, read, strict=True) for part in predict(other, fold.texts)]
        out_of_fold, fitted_gain = torch.cat(unseen).numpy(), torch.cat([fold.gain for fold in read]).numpy()
        (predicted, gain, entropy, base_nll), text = _held_out(gate, think(held))
    finally:
        model.train(was_training)
    ways = ways_to_think(out_of_fold)
    model.thinking_gate = gate
    model.config.thinking_gate = True
    report = GateReport(
        fitted_texts=sum(map(len, folds)),
        fitted_tokens=len(fitted_gain),
        texts=len(held),
        tokens=len(gain),
        ridge=strength,
        r_squared=1 - float(((predicted - gain) ** 2).mean() / gain.var()),
        base_nll=float(base_nll.mean()),
        talk_nll=float((base_nll - gain).mean()),
        choices=measure_choices(predicted, gain, entropy, base_nll, text, ways, seed),
        chosen=choose_way(out_of_fold, fitted_gain, ways),
    )
    model.config.thinking_threshold = report.threshold
    return report


def _split(input_ids: Tensor, held_out: float, seed: int) -> tuple[list[Tensor], Tensor]:
    """Returns the indices of the texts of each fold, and of those that are held out."""
    texts, length = input_ids.shape
    if texts < FEWEST:
        raise DataError(
            f"input_ids: got {texts} texts of {length} tokens, needs at least {FEWEST} texts, one of them to hold out; "
            "give more text, or cut it shorter"
        )
    order = torch.from_numpy(np.random.default_rng(seed).permutation(texts))
    count = min(max(1, round(held_out * texts)), texts - FEWEST + 1)
    fitted = order[count:]
    return [fitted[first::FOLDS] for first in range(min(FOLDS, len(fitted)))], order[:count]


@dataclass(frozen=True)
class _Fold:
    """The indices of some texts, with the moments and the gains, float64 [n], of their tokens."""

    texts: Tensor
    moments: Moments
    gain: Tensor

    @classmethod
    def of(cls, texts: Tensor, parts: Iterator[tuple[int, Gains]]) -> _Fold | None:
        """Collects the gains of the texts; None where no token has a next one."""
        total: Moments | None = None
        gain: list[Tensor] = []
        for _, part in parts:
            moments = Moments.of(part.hidden, part.gain)
            total = moments if total is None else total + moments
            gain.append(part.gain.double().cpu())
        return None if total is None else cls(texts, total.cpu(), torch.cat(gain))


def _strength(folds: list[Moments], strengths: list[float]) -> float:
    if len(folds) < 2:
        raise DataError("input_ids: fewer than 2 of the texts to fit to have a next token to predict; give more text")
    if not any(float(fold.yy) for fold in folds):
        raise DataError(
            "input_ids: no thought changes any prediction, so there is nothing to learn; was it trained to think?"
        )
    return choose_strength(folds, strengths)


def _gate(fit: tuple[Tensor, Tensor], device: torch.device) -> ThinkingGate:
    weight, bias = fit
    gate = ThinkingGate(len(weight)).to(device)
    gate.weight.copy_(weight)
    gate.bias.copy_(bias)
    return gate


def _held_out(gate: ThinkingGate, parts: Iterator[tuple[int, Gains]]) -> tuple[Array, NDArray[np.int64]]:
    """Returns predicted gain, true gain, entropy and NLL without thought, [4, tokens], and the text of each token."""
    columns, texts = [], []
    for first, gains in parts:
        rows = (gate(gains.hidden), gains.gain, gains.entropy, gains.base_nll)
        columns.append(torch.stack([row.double().cpu() for row in rows]))
        texts.append(first + gains.text.cpu())
    numbers: Array = torch.cat(columns, dim=1).numpy() if columns else np.zeros((4, 0))
    if numbers.shape[1] < 2 or not numbers[1].var() > 0:
        raise DataError(
            f"input_ids: the {numbers.shape[1]} tokens of the held-out texts are too few to measure a gate; give more "
            "text"
        )
    return numbers, torch.cat(texts).numpy()


@dataclass(frozen=True)
class Gains:
    """Measurements at the positions of some texts that have a next token; NLLs and entropy in nats, float32 [n].

    Args:
        hidden: [n, E], hidden states of the text without thought, after the final norm.
        base_nll: [n], NLL of the next token without thought.
        talk_nll: [n], NLL of the next token after a greedy thought, in the distribution that `generate` draws from.
        entropy: [n], entropy of the prediction without thought.
        text: int64 [n], row of the position's text in the batch.
    """

    hidden: Tensor
    base_nll: Tensor
    talk_nll: Tensor
    entropy: Tensor
    text: Tensor

    @property
    def gain(self) -> Tensor:
        """log p(next token) with the thought minus without, float32 [n]."""
        return self.base_nll - self.talk_nll


@torch.no_grad()
def read_gains(
    model: QuietStarForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    positions: str = "all",
) -> Iterator[Gains]:
    """Thinks greedily at every position of a batch of texts and compares, some positions at a time.

    Args:
        model: Thinking model; the texts are moved to its device.
        input_ids: int64 [B, L], token ids of the texts.
        attention_mask: [B, L], 1 at tokens and 0 at padding, as in `QuietStarForCausalLM.think`; None for no padding.
        positions: Positions to think at: `all`, `every:N` or `entropy:K`.

    Raises:
        ConfigError: `positions` is not one of these.
        DataError: A tensor has a wrong shape, or an NLL is not finite.
    """
    ids, padding = _on_device(model, input_ids, attention_mask)
    for anchors, counted in _pieces(model, ids, padding, positions):
        _, hidden_base, hidden_thought, weight = model._end_thoughts(ids, padding, None, anchors, 1, True, 0)
        target = ids.gather(1, (anchors.long() + 1).clamp_max(ids.shape[1] - 1))
        nlls = _compare(model, hidden_base[counted], hidden_thought[counted], weight[counted], target[counted])
        gains = Gains(hidden_base[counted], *nlls, text=counted.nonzero()[:, 0])
        if not bool((gains.base_nll + gains.talk_nll).isfinite().all()):
            raise DataError(
                "input_ids: the NLL of a token is not finite, so there is no gain to measure; the weights of the model "
                "are damaged, or too large for their type"
            )
        yield gains


@torch.no_grad()
def read_states(
    model: QuietStarForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    positions: str = "all",
) -> Iterator[Tensor]:
    """Yields `Gains.hidden` of `read_gains` in the same order, at the cost of the base alone, without thoughts.

    Args:
        model: Thinking model; the texts are moved to its device.
        input_ids: int64 [B, L], token ids of the texts.
        attention_mask: [B, L], 1 at tokens and 0 at padding, as in `QuietStarForCausalLM.think`; None for no padding.
        positions: Positions to think at: `all`, `every:N` or `entropy:K`.
    """
    ids, padding = _on_device(model, input_ids, attention_mask)
    pieces = _pieces(model, ids, padding, positions)
    hidden = CachedPass(model, ids, padding).text_hidden
    for anchors, counted in pieces:
        row, column = counted.nonzero(as_tuple=True)
        yield hidden[row, anchors.long()[row, column]]


def _on_device(model: QuietStarForCausalLM, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Padding]:
    device = model.head.weight.device
    ids = input_ids.to(device)
    return ids, read_padding(ids, None if attention_mask is None else attention_mask.to(device))


def _pieces(model: QuietStarForCausalLM, ids: Tensor, padding: Padding, positions: str) -> list[tuple[Tensor, Tensor]]:
    """Returns anchors [B, some], as many as think at once, and which of them have a next token."""
    pieces = model.choose_anchors(ids, padding, positions).split(max(1, STREAMS // len(ids)), dim=1)
    found = [(anchors, padding.has_next.gather(1, anchors.long())) for anchors in pieces]
    return [(anchors, counted) for anchors, counted in found if bool(counted.any())]


def _compare(
    model: QuietStarForCausalLM, hidden_base: Tensor, hidden_thought: Tensor, weight: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `base_nll`, `talk_nll` and `entropy` from [n, E], [n, E], [n] and [n], in chunks that limit the
    logits.
    """
    head = model.head
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    rows = max(1, ENTROPY_CHUNK // head.weight.shape[0])
    for base, thought, share, token in zip(
        hidden_base.split(rows), hidden_thought.split(rows), weight.split(rows), target.split(rows), strict=True
    ):
        without = head.logits(base).float().log_softmax(-1)
        # the paper's mixture does not sum to one, and sampling from it normalises
        mixed = head.mixed_logits(base, thought, share, model.config.interpolation).float().log_softmax(-1)
        parts.append(
            (
                -without.gather(-1, token[:, None])[:, 0],
                -mixed.gather(-1, token[:, None])[:, 0],
                -(without.exp() * without).sum(-1),
            )
        )
    base_nll, talk_nll, entropy = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return base_nll, talk_nll, entropy


@dataclass(frozen=True)
class Moments:
    """Sums over rows of features x [E] and a target y, all float64: everything that a least-squares fit depends on.

    Args:
        count: Number of rows, [].
        x: Sum of x, [E].
        y: Sum of y, [].
        xx: Sum of x x^T, [E, E].
        xy: Sum of x y, [E].
        yy: Sum of y^2, [].
    """

    count: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, features: Tensor, target: Tensor) -> Moments:
        """Returns the moments of some rows.

        Args:
            features: [n, E], features of each row, any floating dtype.
            target: [n], target of each row.
        """
        x, y = features.double(), target.double()
        count = torch.tensor(float(len(y)), dtype=torch.float64, device=y.device)
        return cls(count, x.sum(0), y.sum(), x.T @ x, x.T @ y, y @ y)

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(mine + its for mine, its in zip(self._sums(), other._sums(), strict=True)))

    def __sub__(self, other: Moments) -> Moments:
        return Moments(*(mine - its for mine, its in zip(self._sums(), other._sums(), strict=True)))

    def cpu(self) -> Moments:
        """Returns the same moments on the CPU."""
        return Moments(*(tensor.cpu() for tensor in self._sums()))

    def squared_error(self, weight: Tensor, bias: Tensor) -> float:
        """Returns the mean of (weight x + bias - y)^2 over the rows."""
        total = (
            self.yy
            + weight @ self.xx @ weight
            + self.count * bias**2
            + 2 * bias * (weight @ self.x - self.y)
            - 2 * weight @ self.xy
        )
        return float(total / self.count)

    def _sums(self) -> tuple[Tensor, ...]:
        return self.count, self.x, self.y, self.xx, self.xy, self.yy


def fit_ridge(moments: Moments, strength: float) -> tuple[Tensor, Tensor]:
    """Minimises mean (w x + b - y)^2 + strength * sum_j (s_j w_j)^2, with s_j the standard deviation of feature j.

    The penalty is thus on the weights of standardised features, and not on the bias; the result is for the original
    features.

    Args:
        moments: Moments of at least one row.
        strength: Strength of the penalty, above 0, so that a constant feature, or more features than rows, do no harm.

    Returns:
        float64 w [E] and b [].
    """
    mean_x, mean_y = moments.x / moments.count, moments.y / moments.count
    covariance = moments.xx / moments.count - torch.outer(mean_x, mean_x)
    with_target = moments.xy / moments.count - mean_x * mean_y
    spread = covariance.diagonal().clamp_min(0).sqrt()
    # a constant feature has a deviation of rounding errors alone, which must not be scaled up to 1
    scale = torch.where(spread > 1e-7 * (moments.xx.diagonal() / moments.count).sqrt(), spread, torch.inf)
    matrix = covariance / torch.outer(scale, scale)
    matrix.diagonal().add_(strength)
    factor = torch.linalg.cholesky(matrix)
    weight = torch.cholesky_solve((with_target / scale)[:, None], factor)[:, 0] / scale
    return weight, mean_y - weight @ mean_x


def fit_to_others(folds: Sequence[Moments], strength: float) -> list[tuple[Tensor, Tensor]]:
    """Returns for each fold the w [E] and b of a fit to all others, float64: they predict its rows as unseen ones.

    Args:
        folds: Moments of each fold, at least two.
        strength: Strength of the penalty, above 0.
    """
    together = add(folds)
    return [fit_ridge(together - fold, strength) for fold in folds]


def choose_strength(folds: Sequence[Moments], strengths: Sequence[float]) -> float:
    """Returns the strength with the smallest error in cross-validation: each fold is predicted by a fit to the others.

    Args:
        folds: Moments of each fold, at least two.
        strengths: Strengths to choose from, at least one; the first of equally good ones is taken.
    """

    def error(strength: float) -> float:
        fits = zip(folds, fit_to_others(folds, strength), strict=True)
        return sum(fold.squared_error(*fit) * float(fold.count) for fold, fit in fits)

    return min(strengths, key=error)


def add(folds: Sequence[Moments]) -> Moments:
    """Returns the moments of all rows of several parts."""
    together = folds[0]
    for fold in folds[1:]:
        together = together + fold
    return together
