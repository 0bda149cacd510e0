"""Null models: attention that knows less. What a metric says of a head is how far it is from these.

An untrained model of the same architecture is another one: record its calls and analyse them beside.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import ArrayLike

from ._arrays import Floats, Ints, normalized, steps, weights
from .attention_call import AttentionCall
from .pairs import Pairs

__all__ = ["alibi_rows", "alibi_slope", "random_call", "shuffled_rows", "uniform_rows"]


def uniform_rows(visible: ArrayLike) -> Floats:
    """Return the attention of a query to which all keys that it sees are alike, as in an untrained model.

    Parameters
    ----------
    visible : array
        bool `(..., N)`.

    Returns
    -------
    array
        float64 `(..., N)`: one over the number of visible keys; NaN for a row without one.
    """
    return normalized(weights("visible", np.asarray(visible, np.bool_)))


def shuffled_rows(rows: ArrayLike, visible: ArrayLike, rng: np.random.Generator) -> Floats:
    """Return rows whose weights are permuted at random among the visible keys, each row by itself.

    Sizes of weights stay, and with them the positional entropy; places are lost.

    Parameters
    ----------
    rows : array
        `(R, N)`: attention weights, not negative.
    visible : array
        bool `(R, N)`.
    rng : numpy.random.Generator
        What draws the permutations; the same state gives the same rows.

    Returns
    -------
    array
        float64 `(R, N)`; 0 at hidden keys.
    """
    a, seen = weights("rows", rows), np.asarray(visible, np.bool_)
    # Both orders have the visible keys of a row first.
    drawn = np.argsort(np.where(seen, rng.random(a.shape), 2.0), axis=-1)
    places = np.argsort(~seen, axis=-1, kind="stable")
    shuffled = np.zeros_like(a)
    np.put_along_axis(shuffled, places, np.take_along_axis(np.where(seen, a, 0.0), drawn, -1), -1)
    return shuffled


def alibi_slope(head: int, heads: int) -> float:
    """Return ALiBi's slope for a head, `2**(-8 (head + 1) / heads)`, also where `heads` is no power of two."""
    return 2.0 ** (-8.0 * (head + 1) / heads)


def alibi_rows(visible: ArrayLike, positions: Ints, slope: float) -> Floats:
    """Return attention that decays with the distance alone, `exp(-slope |p - s|)` divided by its sum.

    Parameters
    ----------
    visible : array
        bool `(R, N)`.
    positions : array
        int `(R,)`: the positions of the queries among the `N` keys.
    slope : float
        How fast it decays, per token; see `alibi_slope`.

    Returns
    -------
    array
        float64 `(R, N)`; 0 at hidden keys, NaN for a row without a visible one.
    """
    seen = np.asarray(visible, np.bool_)
    logits = np.where(seen, -slope * np.abs(steps(seen.shape[-1]) - positions[:, None]), -np.inf)
    largest = logits.max(-1, keepdims=True)
    return normalized(np.exp(logits - np.where(np.isfinite(largest), largest, 0.0)))


def random_call(call: AttentionCall, seed: int) -> AttentionCall:
    """Return the call with queries and keys of independent normal numbers, in place of its own.

    Those of each head have the root mean square of the head's, so logits are about as large, and nothing is related.
    Padding does not count, nor what is not finite.
    Masks, scale and all else stay.

    Parameters
    ----------
    call : AttentionCall
        The call.
    seed : int
        Of the random numbers; the same seed gives the same bits.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = Pairs(call)
    valid = [pairs.valid(item) for item in range(call.query.shape[0])]

    def drawn(x: torch.Tensor, tokens: list[torch.Tensor]) -> torch.Tensor:
        squares = x.detach().double().square()
        known = squares.isfinite()
        for of_item, is_valid in zip(known, tokens, strict=True):
            of_item &= is_valid[:, None]
        size = squares.where(known, 0.0).sum((-2, -1), keepdim=True) / known.sum((-2, -1), keepdim=True).clamp(min=1)
        return (torch.randn(x.shape, generator=generator, dtype=torch.float64) * size.sqrt()).to(x.dtype)

    query = drawn(call.query, [queries for queries, _ in valid])
    return replace(call, query=query, key=drawn(call.key, [keys for _, keys in valid]))
