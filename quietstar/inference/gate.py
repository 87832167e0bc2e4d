"""Fitting the thinking gate: from texts with thoughts everywhere to a prediction of where they pay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from quietstar.errors import ConfigError, DataError
from quietstar.inference.gains import Gains, read_gains
from quietstar.inference.gate_report import Array, GateReport, measure_choices
from quietstar.inference.ridge import Moments, add, choose_strength, fit_ridge
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
    text's hidden state, in closed form in float64, from one pass over the texts. The strength is chosen by
    cross-validation on the texts that are not held out; the report is of the held-out ones, which nothing is fitted to.

    Args:
        model: Gets the gate, `config.thinking_gate`, and the advised `config.thinking_threshold`; nothing else of it
            changes. A gate that it has is replaced.
        input_ids: int64 [N, L], at least 3; each text is either fitted to or held out.
        attention_mask: As in `QuietStarForCausalLM.think`.
        positions: Where to look at gains: `all`, `every:N` or `entropy:K`.
        ridge: Strength of the shrinking, relative to standardised features; of several the best is taken.
        held_out: Share of the texts, at least one.
        seed: Of the split, and of the random choices in the report.
        batch_size: Texts at once.
        progress: Called with the texts that are done, and all of them.

    Raises:
        ConfigError: An option is out of range.
        DataError: Too little text, a tensor of a wrong shape, or thoughts that change nothing.
    """
    strengths = [ridge] if isinstance(ridge, (int, float)) else list(ridge)
    _check(strengths, held_out, batch_size)
    read_padding(input_ids, attention_mask)  # refuses wrong shapes before any work is done
    folds, held = _split(input_ids, held_out, seed)
    done = 0

    def read(texts: Tensor) -> Iterator[Gains]:
        nonlocal done
        for batch in texts.split(batch_size):
            mask = None if attention_mask is None else attention_mask[batch]
            yield from read_gains(model, input_ids[batch], mask, positions=positions)
            done += len(batch)
            if progress is not None:
                progress(done, input_ids.shape[0])

    was_training = model.training
    model.train(False)
    try:
        moments = [total for texts in folds if (total := _moments(read(texts))) is not None]
        gate, strength = _fit(moments, strengths, model.head.weight.device)
        predicted, gain, entropy, base_nll = _held_out(gate, read(held))
    finally:
        model.train(was_training)
    model.thinking_gate = gate
    model.config.thinking_gate = True
    report = GateReport(
        fitted_texts=sum(map(len, folds)),
        fitted_tokens=round(sum(float(fold.count) for fold in moments)),
        texts=len(held),
        tokens=len(gain),
        ridge=strength,
        r_squared=1 - float(((predicted - gain) ** 2).mean() / gain.var()),
        base_nll=float(base_nll.mean()),
        talk_nll=float((base_nll - gain).mean()),
        choices=measure_choices(predicted, gain, entropy, base_nll, seed),
    )
    model.config.thinking_threshold = report.threshold
    return report


def _check(strengths: list[float], held_out: float, batch_size: int) -> None:
    if not strengths or not all(0 < strength < float("inf") for strength in strengths):
        raise ConfigError(f"ridge: got {strengths}, needs one or more numbers above 0")
    if not 0 < held_out < 1:
        raise ConfigError(f"held_out: got {held_out}, needs a share between 0 and 1")
    if batch_size < 1:
        raise ConfigError(f"batch_size: got {batch_size}, needs at least 1")


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


def _moments(parts: Iterator[Gains]) -> Moments | None:
    total: Moments | None = None
    for gains in parts:
        moments = Moments.of(gains.hidden, gains.gain)
        total = moments if total is None else total + moments
    return None if total is None else total.cpu()


def _fit(folds: list[Moments], strengths: list[float], device: torch.device) -> tuple[ThinkingGate, float]:
    if len(folds) < 2:
        raise DataError("input_ids: fewer than 2 of the texts to fit to have a next token to predict; give more text")
    if not any(float(fold.yy) for fold in folds):
        raise DataError(
            "input_ids: no thought changes any prediction, so there is nothing to learn; was it trained to think?"
        )
    strength = choose_strength(folds, strengths)
    weight, bias = fit_ridge(add(folds), strength)
    gate = ThinkingGate(len(weight)).to(device)
    gate.weight.copy_(weight)
    gate.bias.copy_(bias)
    return gate, strength


def _held_out(gate: ThinkingGate, parts: Iterator[Gains]) -> Array:
    """Predicted gain, true gain, entropy and NLL without thought, [4, tokens]."""
    columns = [
        torch.stack([row.double().cpu() for row in (gate(gains.hidden), gains.gain, gains.entropy, gains.base_nll)])
        for gains in parts
    ]
    rows: Array = torch.cat(columns, dim=1).numpy() if columns else np.zeros((4, 0))
    if rows.shape[1] < 2 or not rows[1].var() > 0:
        raise DataError(
            f"input_ids: the {rows.shape[1]} tokens of the held-out texts are too few to measure a gate; give more text"
        )
    return rows
