"""Fitting the thinking gate: from texts with thoughts everywhere to a prediction of where they pay.

What thinking gains at each position of texts, beside what is known there before thinking.

Ridge regression from sums over the data, so that any amount of it needs one pass and E x E numbers.
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
from quietstar.model.padding import read_padding
from quietstar.model.passes import CachedPass
from quietstar.model.thoughts import ENTROPY_CHUNK

RIDGE = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 4
FEWEST = 3
"""Texts: two folds, and one held out."""


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
    """Give a model a gate that predicts, before each thought, what it will gain.

    The target is log p(next token) with a greedy thought minus without, at every position: ridge regression on the
    text's hidden state, in closed form in float64, from one pass with thoughts over the texts, and one without over
    those that are not held out. Cross-validation on these chooses the strength, and the predicted gain from which on to
    think; a token takes two numbers of memory. The report is of the held-out texts, which nothing is fitted to. They
    decide one thing: thinking is advised only where it surely gains there (`GateReport.advised`); otherwise
    `think="learned"` means never. That a gain is sure does not say that it is large: the report has its size. Texts cut
    from one document are alike, and make it look surer than it is for another document.

    Args:
        model: Gets the gate, `config.thinking_gate`, and the advised `config.thinking_threshold`; nothing else of it
            changes. A gate that it has is replaced.
        input_ids: int64 [N, L], at least 3; each text is either fitted to or held out.
        attention_mask: As in `QuietStarForCausalLM.think`.
        positions: Where to look at gains: `all`, `every:N` or `entropy:K`.
        ridge: Strength of the shrinking, relative to standardised features; of several the best is taken.
        held_out: Share of the texts, at least one; of fewer than 6 thinking is never advised.
        seed: Of the split, and of the random choices and resampled texts in the report.
        batch_size: Texts at once.
        progress: Called with the texts that are done, and all of them.

    Raises:
        ConfigError: An option is out of range.
        DataError: Too little text, a tensor of a wrong shape, or thoughts that change nothing.
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
        """With the number of texts before the batch."""
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
    """Places of the texts of each fold, and of those that are held out."""
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
    """Places of some texts, and of their tokens the moments and the gain, float64 [n]."""

    texts: Tensor
    moments: Moments
    gain: Tensor

    @classmethod
    def of(cls, texts: Tensor, parts: Iterator[tuple[int, Gains]]) -> _Fold | None:
        """None where no token has a next one."""
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
    """Predicted gain, true gain, entropy and NLL without thought, [4, tokens], and the text of each token."""
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


STREAMS = 2048
"""Positions that think at once, which bounds the memory; for more of them the text is run again."""


@dataclass(frozen=True)
class Gains:
    """Positions of some texts whose next token is known. NLLs and entropy in nats, float32 [n].

    Args:
        hidden: [n, E] hidden states of the text without thought, after the final norm.
        base_nll: NLL of the next token without thought.
        talk_nll: The same after a greedy thought, of the prediction that `generate` draws from.
        entropy: Of the prediction without thought.
        text: Row of the batch, int64 [n].
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
    """Thinks greedily at every position of a batch of texts and compares, some positions after the other.

    Args:
        model: On its device; the texts are moved there.
        input_ids: int64 [B, L].
        attention_mask: As in `QuietStarForCausalLM.think`.
        positions: `all`, `every:N` or `entropy:K`.

    Raises:
        ConfigError: Unknown positions.
        DataError: A tensor has a wrong shape, or an NLL is not finite.
    """
    ids, mask = _on_device(model, input_ids, attention_mask)
    for anchors, counted in _pieces(model, ids, mask, positions):
        _, hidden_base, hidden_thought, weight = model._end_thoughts(ids, mask, None, anchors, 1, True, 0)
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
    """`Gains.hidden` of `read_gains` in the same order, for the cost of the base alone: nothing is thought.

    Args:
        model: On its device; the texts are moved there.
        input_ids: int64 [B, L].
        attention_mask: As in `QuietStarForCausalLM.think`.
        positions: `all`, `every:N` or `entropy:K`.
    """
    ids, mask = _on_device(model, input_ids, attention_mask)
    pieces = _pieces(model, ids, mask, positions)
    hidden = CachedPass(model, ids, read_padding(ids, mask), False).text_hidden
    for anchors, counted in pieces:
        row, column = counted.nonzero(as_tuple=True)
        yield hidden[row, anchors.long()[row, column]]


def _on_device(
    model: QuietStarForCausalLM, input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    device = model.head.weight.device
    return input_ids.to(device), None if attention_mask is None else attention_mask.to(device)


def _pieces(
    model: QuietStarForCausalLM, ids: Tensor, mask: Tensor | None, positions: str
) -> list[tuple[Tensor, Tensor]]:
    """Anchors [B, some], as many as think at once, and which of them have a next token."""
    has_next = read_padding(ids, mask).has_next
    pieces = model.choose_anchors(ids, mask, positions).split(max(1, STREAMS // len(ids)), dim=1)
    found = [(anchors, has_next.gather(1, anchors.long())) for anchors in pieces]
    return [(anchors, counted) for anchors, counted in found if bool(counted.any())]


def _compare(
    model: QuietStarForCausalLM, hidden_base: Tensor, hidden_thought: Tensor, weight: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`base_nll`, `talk_nll` and `entropy` from [n, E], [n, E], [n] and [n], in chunks that bound the logits."""
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
    """Sums over rows of features x [E] and a target y, all float64: what a least-squares fit depends on.

    Args:
        count: Rows, a scalar as are `y` and `yy`.
        x: Sum of x, [E].
        y: Sum of y.
        xx: Sum of x x^T, [E, E].
        xy: Sum of x y, [E].
        yy: Sum of y^2.
    """

    count: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, features: Tensor, target: Tensor) -> Moments:
        """Of some rows.

        Args:
            features: [n, E], any floating dtype.
            target: [n].
        """
        x, y = features.double(), target.double()
        count = torch.tensor(float(len(y)), dtype=torch.float64, device=y.device)
        return cls(count, x.sum(0), y.sum(), x.T @ x, x.T @ y, y @ y)

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(mine + its for mine, its in zip(self._sums(), other._sums(), strict=True)))

    def __sub__(self, other: Moments) -> Moments:
        return Moments(*(mine - its for mine, its in zip(self._sums(), other._sums(), strict=True)))

    def cpu(self) -> Moments:
        """The same on the CPU."""
        return Moments(*(tensor.cpu() for tensor in self._sums()))

    def squared_error(self, weight: Tensor, bias: Tensor) -> float:
        """Mean of (weight x + bias - y)^2 over the rows."""
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
    """Minimise mean (w x + b - y)^2 + strength * sum_j (s_j w_j)^2, s_j the standard deviation of feature j.

    So it is standardised features that are shrunk, and the bias is not; the result is for the features as they are.

    Args:
        moments: Of at least one row.
        strength: Above 0; then a constant feature, and more features than rows, do no harm.

    Returns:
        float64 w [E] and b.
    """
    mean_x, mean_y = moments.x / moments.count, moments.y / moments.count
    covariance = moments.xx / moments.count - torch.outer(mean_x, mean_x)
    with_target = moments.xy / moments.count - mean_x * mean_y
    spread = covariance.diagonal().clamp_min(0).sqrt()
    # of a constant feature only rounding is left, which must not be blown up to a deviation of 1
    scale = torch.where(spread > 1e-7 * (moments.xx.diagonal() / moments.count).sqrt(), spread, torch.inf)
    matrix = covariance / torch.outer(scale, scale)
    matrix.diagonal().add_(strength)
    factor = torch.linalg.cholesky(matrix)
    weight = torch.cholesky_solve((with_target / scale)[:, None], factor)[:, 0] / scale
    return weight, mean_y - weight @ mean_x


def fit_to_others(folds: Sequence[Moments], strength: float) -> list[tuple[Tensor, Tensor]]:
    """For each fold the w [E] and b of a fit to all others, float64: what predicts its rows as if they were new.

    Args:
        folds: At least two.
        strength: As for `fit_ridge`.
    """
    together = add(folds)
    return [fit_ridge(together - fold, strength) for fold in folds]


def choose_strength(folds: Sequence[Moments], strengths: Sequence[float]) -> float:
    """The strength with the smallest error in cross-validation: each fold is predicted by a fit to the others.

    Args:
        folds: At least two.
        strengths: At least one; the first of equals is taken.
    """

    def error(strength: float) -> float:
        fits = zip(folds, fit_to_others(folds, strength), strict=True)
        return sum(fold.squared_error(*fit) * float(fold.count) for fold, fit in fits)

    return min(strengths, key=error)


def add(folds: Sequence[Moments]) -> Moments:
    """The moments of all rows of some parts."""
    together = folds[0]
    for fold in folds[1:]:
        together = together + fold
    return together
