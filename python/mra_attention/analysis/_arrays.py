"""Signals and distributions as NumPy arrays of float64, along the last axis."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

ROUNDOFF = 1e-12
"""What is this small beside the numbers that it comes from is 0: sums of thousands of float64 are no more exact."""


def floats(name: str, given: ArrayLike | Tensor) -> Floats:
    """Return an argument as float64 with at least one element along its last axis.

    Raises
    ------
    ValueError
        If it is a number, or empty along its last axis.
    """
    plain: Any = given.detach().double().numpy() if isinstance(given, Tensor) else given
    array = np.asarray(plain, dtype=np.float64)
    if array.ndim == 0 or array.shape[-1] == 0:
        raise ValueError(f"{name} must be an array (..., N) with N of at least 1, got the shape {array.shape}")
    return array


def weights(name: str, given: ArrayLike | Tensor) -> Floats:
    """Return an argument as `floats` does, and check that no element is negative."""
    array = floats(name, given)
    if bool((array < 0.0).any()):
        raise ValueError(f"{name} must not be negative, got {array.min()}")
    return array


def steps(count: int) -> Floats:
    """Return 0, 1, ..., count - 1."""
    return np.arange(count, dtype=np.float64)


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Divide; what is divided by 0 becomes NaN if it is 0 itself, and infinite if not."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(numerator / denominator, dtype=np.float64)


def normalized(array: Floats) -> Floats:
    """Divide by the sum along the last axis; NaN where that is 0."""
    return ratio(array, array.sum(-1, keepdims=True))
