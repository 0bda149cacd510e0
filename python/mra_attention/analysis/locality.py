"""How near to the query attention is, and how it is spread within windows of keys. The paper defines neither."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ._arguments import choice
from ._arrays import Floats, normalized, ratio, steps, weights
from .entropies import entropy

__all__ = ["local_share", "window_entropy"]


def local_share(rows: ArrayLike, positions: ArrayLike, *, window: int = 32) -> Floats:
    """Return the share of attention that goes to keys nearer than `window` tokens.

    The local/global ratio of a head is `m / (1 - m)`, with the mean `m` of these shares.

    Parameters
    ----------
    rows : array
        `(R, N)`: attention weights, not negative. Rows are divided by their sums.
    positions : array
        int `(R,)`: the positions of the queries among the `N` keys.
    window : int, default 32
        A key at position `s` is local to a query at `p` if `|p - s| < window`: with causality the query's own token
        and the `window - 1` before it.

    Returns
    -------
    array
        float64 `(R,)`, from 0 to 1; NaN for a row of zeros.

    Raises
    ------
    ValueError
        If a weight is negative, `window` is below 1, or shapes do not fit.
    """
    a, p = weights("rows", rows), np.asarray(positions)
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if a.ndim != 2 or p.shape != a.shape[:1]:
        raise ValueError(f"rows and positions must be (R, N) and (R,), got {a.shape} and {p.shape}")
    near = np.abs(steps(a.shape[1]) - p[:, None]) < window
    return ratio((a * near).sum(-1), a.sum(-1))


def window_entropy(
    rows: ArrayLike, window: int, *, visible: ArrayLike | None = None, weighting: str = "mass"
) -> Floats:
    """Return how evenly attention is spread within windows of `window` keys, from 0 to 1.

    Keys are cut into consecutive windows. In each, the weights are divided by their sum, and their entropy is divided
    by the logarithm of how many of the keys are visible. The result is a mean over the windows with two visible keys
    or more.

    Parameters
    ----------
    rows : array
        `(..., N)`: attention weights, not negative.
    window : int
        Keys of a window, at least 2; the paper has 16, 32 and 64. The last window may have fewer.
    visible : array, optional
        bool `(..., N)`: which keys the query sees; by default all.
    weighting : {"mass", "equal"}, default "mass"
        Whether windows count by their share of attention or all alike. Windows without attention never count.

    Returns
    -------
    array
        float64 `(...)`: 1 where attention is uniform within windows, 0 where each has one key; NaN if no window counts.

    Raises
    ------
    ValueError
        If an argument is not accepted.
    """
    a = weights("rows", rows)
    choice("weighting", weighting, ("mass", "equal"))
    if window < 2:
        raise ValueError(f"window must be at least 2, got {window}")
    seen = np.ones(a.shape, np.bool_) if visible is None else np.asarray(visible, np.bool_)
    if seen.shape != a.shape:
        raise ValueError(f"visible must have the shape of rows, {a.shape}, got {seen.shape}")
    missing = [(0, 0)] * (a.ndim - 1) + [(0, -a.shape[-1] % window)]
    cut = (*a.shape[:-1], -(-a.shape[-1] // window), window)
    windows = np.reshape(np.pad(a, missing), cut)
    count = np.reshape(np.pad(seen, missing), cut).sum(-1)
    mass = windows.sum(-1)
    counts = (mass > 0.0) & (count > 1)
    evenness = ratio(entropy(normalized(windows)), np.log(np.maximum(count, 1)))
    factor = np.where(counts, mass if weighting == "mass" else 1.0, 0.0)
    return ratio((factor * np.where(counts, evenness, 0.0)).sum(-1), factor.sum(-1))
