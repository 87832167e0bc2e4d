"""Fitting the thinking gate: from texts with thoughts everywhere to a prediction of where they pay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quietstar.errors import ConfigError, DataError
from quietstar.inference.gains import Gains, read_gains, read_states
from quietstar.inference.gate_choices import Array, check_fit, choose_way, measure_choices, ways_to_think
from quietstar.inference.gate_report import GateReport
from quietstar.inference.ridge import Moments, add, choose_strength, fit_ridge, fit_to_others
from quietstar.model import QuietStarForCausalLM
from quietstar.model.padding import read_padding
from quietstar.model.thinking_gate import ThinkingGate

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
    check_fit(held_out, batch_size)
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
