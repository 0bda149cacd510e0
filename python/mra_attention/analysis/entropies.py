"""Entropies of attention: over positions, over frequencies, and how the two go together."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ._arrays import ROUNDOFF, Floats, floats, normalized, weights

__all__ = ["entropy", "entropy_correlation", "positional_entropy", "spectral_entropy"]


def entropy(probabilities: ArrayLike, *, base: float = math.e) -> Floats:
    """Return `-sum p log p` along the last axis, with `0 log 0 = 0`.

    Parameters
    ----------
    probabilities : array
        `(..., N)`, not negative. They are taken as they are: nothing makes them sum to 1.
    base : float, default e
        Of the logarithm: e for nats, 2 for bits.

    Returns
    -------
    array
        float64 `(...)`; NaN where a probability is.

    Raises
    ------
    ValueError
        If a probability is negative, or `base` is not above 1.
    """
    p = weights("probabilities", probabilities)
    if not base > 1.0:
        raise ValueError(f"base must be above 1, got {base}")
    logarithms = np.log(p, where=p != 0.0, out=np.zeros_like(p))
    return 0.0 - (p * logarithms).sum(-1) / math.log(base)


def positional_entropy(rows: ArrayLike, *, normalize: bool = True, base: float = math.e) -> Floats:
    """Return the entropy of attention over positions, `H_p = -sum_t a(t) log a(t)`: equation 6 of the paper.

    Parameters
    ----------
    rows : array
        `(..., N)`: attention weights, not negative.
    normalize : bool, default True
        Whether to divide each row by its sum first, which is below 1 where there are sinks.
    base : float, default e
        Of the logarithm.

    Returns
    -------
    array
        float64 `(...)`: from 0, for one position, to `log N`, for uniform attention. NaN for a row of zeros that is to
        be normalized.

    Raises
    ------
    ValueError
        If a weight is negative, or `base` is not above 1.
    """
    a = weights("rows", rows)
    return entropy(normalized(a) if normalize else a, base=base)


def spectral_entropy(power: ArrayLike, *, base: float = math.e) -> Floats:
    """Return the entropy of a spectrum, `H_s = -sum_w P(w)/sum P log P(w)/sum P`: equation 7 of the paper.

    Parameters
    ----------
    power : array
        `(..., F)`: `power_spectral_density(...).power`.
    base : float, default e
        Of the logarithm.

    Returns
    -------
    array
        float64 `(...)`: from 0, for one frequency, to `log F`, for a flat spectrum. NaN where there is no power.

    Raises
    ------
    ValueError
        If a power is negative, or `base` is not above 1.
    """
    return entropy(normalized(weights("power", power)), base=base)


def entropy_correlation(positional: ArrayLike, spectral: ArrayLike) -> float:
    """Return Pearson's correlation of positional and spectral entropies of one head: equation 8 of the paper.

    Parameters
    ----------
    positional, spectral : array
        `(S,)`: the entropies of the same samples. The paper does not say what a sample is; `analyze` takes every
        signal of every sequence. Samples with a NaN are left out.

    Returns
    -------
    float
        From -1 to 1; NaN with fewer than two samples, or where one of the entropies is the same for all of them.

    Raises
    ------
    ValueError
        If the arrays are not of one shape `(S,)`.

    Notes
    -----
    A negative correlation says little by itself: both entropies are of the same signal, whose peak has a flat spectrum
    and whose plateau has a narrow one. See `entropic_uncertainty` for what an uncertainty principle does say.
    """
    x, y = floats("positional", positional), floats("spectral", spectral)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"positional and spectral must be of one shape (S,), got {x.shape} and {y.shape}")
    known = ~(np.isnan(x) | np.isnan(y))
    x, y = x[known], y[known]
    if any(z.size < 2 or np.ptp(z) <= ROUNDOFF * np.abs(z).max() for z in (x, y)):
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()))
