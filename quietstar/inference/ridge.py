"""Ridge regression from sums over the data, so that any amount of it needs one pass and E x E numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
