"""Checks of what the measures are given."""

from __future__ import annotations

from collections.abc import Sized

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quietstar.errors import ConfigError, DataError

Array = NDArray[np.float64]


def numbers(name: str, values: ArrayLike) -> Array:
    """The values as float64 [n].

    Raises:
        DataError: There is none, there are several dimensions, or one is not a number.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: {error}; needs numbers") from None
    if array.ndim != 1 or not len(array):
        raise DataError(f"{name}: has the shape {list(array.shape)}; needs one dimension with at least one value")
    if np.isnan(array).any():
        raise DataError(f"{name}: NaN at index {int(np.isnan(array).argmax())}; needs numbers that can be compared")
    return array


def within(name: str, values: ArrayLike, low: float, high: float) -> Array:
    """The same for numbers from `low` to `high`, such as truth values and probabilities.

    Raises:
        DataError: One lies outside.
    """
    array = numbers(name, values)
    outside = (array < low) | (array > high)
    if outside.any():
        index = int(outside.argmax())
        raise DataError(f"{name}: {array[index]:g} at index {index}; needs {low:g} to {high:g}")
    return array


def truths(name: str, values: ArrayLike) -> Array:
    """Truth values as 0.0 and 1.0.

    Raises:
        DataError: One is neither.
    """
    array = within(name, values, 0, 1)
    if ((array != 0) & (array != 1)).any():
        index = int(((array != 0) & (array != 1)).argmax())
        raise DataError(f"{name}: {array[index]:g} at index {index}; needs True or False")
    return array


def same_length(**values: Sized) -> None:
    """Refuses arguments of unequal lengths.

    Raises:
        DataError: naming them with their lengths.
    """
    lengths = {name: len(value) for name, value in values.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise DataError(f"{shown}; they need one value for each of the same candidates")


def check_k(k: int, candidates: int) -> None:
    """Refuses a subset that cannot be drawn.

    Raises:
        ConfigError: `k` is not in 1 to `candidates`.
    """
    if not 1 <= k <= candidates:
        raise ConfigError(f"k: is {k}; needs 1 to the number of candidates, {candidates}")
