"""Ridge regression by least squares on the whole design matrix: what moments and a closed form have to equal."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def dense_ridge(features: Array, target: Array, strength: float) -> tuple[Array, float]:
    """Least squares on the standardised matrix with one more row for each shrunk weight.

    Args:
        features: [n, E], none of them constant.
        target: [n].
        strength: Of the shrinking.

    Returns:
        Weights [E] of the features as they are, and the offset.
    """
    mean, scale, (rows, size) = features.mean(0), features.std(0), features.shape
    design = np.concatenate([(features - mean) / scale, np.sqrt(strength * rows) * np.eye(size)])
    wanted = np.concatenate([target - target.mean(), np.zeros(size)])
    weight = np.linalg.lstsq(design, wanted, rcond=None)[0] / scale
    return weight, float(target.mean() - weight @ mean)
