"""The closed form is that of the dense design matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from quietstar.inference.gate import Moments, add, choose_strength, fit_ridge, fit_to_others
from tests.inference.dense_ridge import dense_ridge

ROWS, SIZE = 60, 5


def data(rows: int = ROWS, noise: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of different scales, offsets and correlations, and a target that is linear in them but for noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, SIZE, generator=generator, dtype=torch.float64)
    x[:, 1] += 0.9 * x[:, 0]
    x = x * torch.tensor([1.0, 0.01, 30.0, 2.0, 1.0]) + torch.tensor([0.0, 5.0, -100.0, 1.0, 0.3])
    y = x @ torch.tensor([1.0, 20.0, 0.02, -0.5, 0.0], dtype=torch.float64) + 4
    return x, y + noise * torch.randn(rows, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("strength", [1e-6, 1e-2, 3.0])
def test_the_closed_form_is_that_of_the_dense_matrix(strength: float) -> None:
    x, y = data()
    weight, bias = fit_ridge(Moments.of(x, y), strength)
    expected, offset = dense_ridge(x.numpy(), y.numpy(), strength)
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-7)
    assert float(bias) == pytest.approx(offset, rel=1e-7)


def test_parts_add_up_and_can_be_taken_out() -> None:
    x, y = data()
    whole = Moments.of(x, y)
    parts = [Moments.of(x[rows], y[rows]) for rows in (slice(20), slice(20, 25), slice(25, None))]
    for actual, expected in ((add(parts), whole), (whole - parts[0], Moments.of(x[20:], y[20:]))):
        torch.testing.assert_close(fit_ridge(actual, 0.1), fit_ridge(expected, 0.1))
    weight, bias = torch.ones(SIZE, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    assert whole.squared_error(weight, bias) == pytest.approx(float(((x @ weight + bias - y) ** 2).mean()))


def test_each_fold_is_predicted_by_a_fit_to_the_others() -> None:
    x, y = data()
    rows = torch.arange(ROWS) % 3
    folds = [Moments.of(x[rows == fold], y[rows == fold]) for fold in range(3)]
    for fold, actual in enumerate(fit_to_others(folds, 0.1)):
        torch.testing.assert_close(actual, fit_ridge(Moments.of(x[rows != fold], y[rows != fold]), 0.1))


def test_features_that_say_nothing_do_no_harm() -> None:
    """One that is constant, one that is 0, one twice, and more features than rows."""
    x, y = data(rows=4)
    more = torch.cat([x, x[:, :1], torch.full((4, 1), 7.3), torch.zeros(4, 1)], dim=1)
    weight, bias = fit_ridge(Moments.of(more, y), 1e-4)
    assert torch.equal(weight[-2:], torch.zeros(2, dtype=torch.float64))
    assert bool(weight.isfinite().all()) and bool(bias.isfinite())
    assert float((more @ weight + bias - y).abs().max()) < 0.1


@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (20, 6, 4, 2)])
def test_cross_validation_shrinks_noise_and_nothing_else(sizes: tuple[int, ...]) -> None:
    """The error is that of a row, whichever fold it is in: a fold of few rows counts for few."""
    strengths = (1e-6, 1e-3, 1e-2, 1e-1, 1.0, 100.0)
    fold = np.repeat(range(4), sizes)

    def chosen(noise: float, seed: int = 0) -> float:
        x, y = data(rows=32, noise=noise, seed=seed)
        folds = [Moments.of(x[fold == held], y[fold == held]) for held in range(4)]
        errors = []
        for strength in strengths:
            squares = 0.0
            for held in range(4):
                own, others = fold == held, fold != held
                weight, bias = dense_ridge(x[others].numpy(), y[others].numpy(), strength)
                squares += float(((x[own].numpy() @ weight + bias - y[own].numpy()) ** 2).sum())
            errors.append(squares)
        assert choose_strength(folds, strengths) == strengths[int(np.argmin(errors))]
        return choose_strength(folds, strengths)

    assert chosen(noise=0.0) == 1e-6
    assert chosen(noise=50.0) >= 1
    assert len({chosen(noise=2.0, seed=seed) for seed in range(8)}) > 1
