"""Means and rank correlations over heads, with intervals from a bootstrap over heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A number, and the ends of its interval of 95 %: percentiles of the bootstrap."""

    value: float
    low: float
    high: float


UNKNOWN = Estimate(float("nan"), float("nan"), float("nan"))


def mean(x: Floats) -> Estimate:
    """Return the mean of numbers (n,), one for each head; those that are NaN are left out, infinite ones are not."""
    known = x[~np.isnan(x)]
    if np.isinf(known).any():
        return Estimate(*[float(known.mean())] * 3)
    return _estimate(lambda counts: counts @ known / counts.sum(-1), np.zeros(known.size, np.int64))


def correlation(x: Floats, y: Floats, groups: Ints | None = None) -> Estimate:
    """Return Spearman's correlation of two numbers of each head (n,); heads with a NaN are left out.

    With groups (n,), such as layers, the ranks are those within the head's group, less their mean, and heads are drawn
    within their groups: what is left is what the groups do not explain.
    """
    return _estimate(*_correlation([x], y, groups))


def lead(first: Floats, second: Floats, y: Floats, groups: Ints | None = None) -> Estimate:
    """Return how much larger the size of the first number's correlation with y is than that of the second number's."""
    statistic, of = _correlation([first, second], y, groups)
    return _estimate(lambda counts: -np.diff(np.abs(statistic(counts)), axis=0)[0], of)


def _correlation(xs: list[Floats], y: Floats, groups: Ints | None) -> tuple[Callable[[Floats], Floats], Ints]:
    """Return the function from counts (..., n) to correlations, with several x (len(xs), ...), and the groups."""
    known = ~np.isnan([*xs, y]).any(0)
    of = np.zeros(known.sum(), np.int64) if groups is None else groups[known]
    same = of[:, None] == of
    # The sum over a sample of the signs of the differences is twice the rank in it, less the mean.
    signs = [same * ((z[:, None] > z) - 1.0 * (z[:, None] < z)) for z in (every[known] for every in (*xs, y))]

    def statistic(counts: Floats) -> Floats:
        *a, b = (counts @ sign.T for sign in signs)
        found = [_cosine(ranks, b, counts) for ranks in a]
        return found[0] if len(found) == 1 else np.stack(found)

    return statistic, of


def _cosine(a: Floats, b: Floats, counts: Floats) -> Floats:
    sizes = np.sqrt((counts * a * a).sum(-1) * (counts * b * b).sum(-1))
    return np.divide((counts * a * b).sum(-1), sizes, where=sizes > 0, out=np.full(np.shape(sizes), np.nan))


def _estimate(statistic: Callable[[Floats], Floats], groups: Ints) -> Estimate:
    """Return a statistic of how often each head counts (..., n): once, and as drawn within groups (n,)."""
    if not groups.size:
        return UNKNOWN
    generator = np.random.default_rng(SEED)
    counts = np.zeros((RESAMPLES, groups.size))
    for group in np.unique(groups):
        here = np.flatnonzero(groups == group)
        counts[:, here] = generator.multinomial(here.size, np.full(here.size, 1 / here.size), RESAMPLES)
    value, found = float(statistic(np.ones(groups.size))), statistic(counts)
    found = found[~np.isnan(found)]
    if np.isnan(value) or not found.size:
        return UNKNOWN
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))
