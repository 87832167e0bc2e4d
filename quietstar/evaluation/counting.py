"""pass@k: how often at least one of k candidates is right."""

from __future__ import annotations

from typing import overload

import numpy as np
from numpy.typing import ArrayLike

from quietstar.errors import ConfigError, DataError
from quietstar.evaluation.arguments import Array


@overload
def pass_at_k(n: int, c: int, k: int) -> float: ...
@overload
def pass_at_k(n: ArrayLike, c: ArrayLike, k: ArrayLike) -> float | Array: ...
def pass_at_k(n: ArrayLike, c: ArrayLike, k: ArrayLike) -> float | Array:
    """Probability that k of n candidates, drawn without replacement, contain one of the c right ones.

    1 - C(n - c, k) / C(n, k) (Chen et al., 2107.03374, Eq. 1), as a product of k factors that cannot overflow.

    Args:
        n: Candidates, at least 1; whole numbers of any shapes that broadcast against each other, as `c` and `k`.
        c: Right ones among them.
        k: Candidates drawn, 1 to n.

    Returns:
        A float, or float64 of the broadcast shape.

    Raises:
        DataError: `n` or `c` is impossible.
        ConfigError: `k` is.
    """
    total, right, drawn = np.broadcast_arrays(*(_whole(name, value) for name, value in (("n", n), ("c", c), ("k", k))))
    if (total < 1).any():
        raise DataError(f"n: is {total.min()}; needs at least one candidate")
    if ((right < 0) | (right > total)).any():
        raise DataError(f"c: is {right[(right < 0) | (right > total)][0]}; needs 0 to n")
    if ((drawn < 1) | (drawn > total)).any():
        raise ConfigError(f"k: is {drawn[(drawn < 1) | (drawn > total)][0]}; needs 1 to n")
    j = np.arange(drawn.max(initial=1))
    total, right, drawn = total[..., None], right[..., None], drawn[..., None]
    # factor j: the (j+1)-th candidate is wrong, all before it being wrong
    wrong = np.clip(total - right - j, 0, None) / np.clip(total - j, 1, None)
    result = 1.0 - np.where(j < drawn, wrong, 1.0).prod(-1)
    return float(result) if result.ndim == 0 else result


def _whole(name: str, value: ArrayLike) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{name}: has the type {array.dtype}; needs whole numbers")
    return array.astype(np.int64)
