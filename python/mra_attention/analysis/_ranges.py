"""What is known of the logits of a query in a block: their mean, and numbers that none of them is below or above."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._planned import Item, Level, Planned, bias_of

_ROWS = 1024
"""Queries whose logits are in memory at a time."""


class Ranges(NamedTuple):
    """For every query and block of a level, `(Lq, nk)`; where the block has no key, or is not seen, of no meaning."""

    product: Tensor
    """The scaled product of the query and the mean key."""
    bias: Tensor
    """The mean bias."""
    mean: Tensor
    low: Tensor
    high: Tensor


def block_means(x: Tensor, level: Level) -> Tensor:
    """Return the means of the valid tokens of every block, `(nk, channels)`."""
    valid = level.block_of >= 0
    sums = x.new_zeros(level.keys.shape[0], x.shape[1]).index_add_(0, level.block_of[valid], x[valid])
    return sums / level.keys.clamp(min=1.0)[:, None]


def norms(x: Tensor) -> Tensor:
    """Return the Euclidean norms of vectors."""
    return x.square().sum(-1).sqrt()


def radii(x: Tensor, means: Tensor, level: Level) -> Tensor:
    """Return how far the valid tokens of every block are from their mean at most, `(nk,)`."""
    valid = level.block_of >= 0
    away = norms(x[valid] - means[level.block_of[valid]])
    return x.new_zeros(means.shape[0]).scatter_reduce_(0, level.block_of[valid], away, "amax")


def ranges_of(found: Planned, item: Item, head: int, level: Level, by_norms: bool) -> Ranges:
    """Return the ranges of a head at a level, from every logit or from norms."""
    query, key, scale = item.query[head], key_of(item, head), found.settings.scale
    if by_norms:
        return _by_norms(query, key, level, scale, bias_of(found, item, head))
    product = scale * (query @ block_means(key, level).T)
    parts = [_by_keys(logits, bias, level) for _, logits, bias in chunks_of_logits(found, item, head)]
    of_bias, mean, low, high = (torch.cat(x) for x in zip(*parts, strict=True))
    return Ranges(product, of_bias, mean, low, high)


def key_of(item: Item, head: int) -> Tensor:
    """Return the keys of a head of the query."""
    return item.key[head // (item.query.shape[0] // item.key.shape[0])]


def chunks_of_logits(found: Planned, item: Item, head: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Give the logits of some queries at a time, `(rows, Lk)`: the first query, the logits, and the bias in them."""
    query, key, bias = item.query[head], key_of(item, head), bias_of(found, item, head)
    for at in range(0, max(1, query.shape[0]), _ROWS):
        logits = capped(found.settings.scale * (query[at : at + _ROWS] @ key.T), found.settings.softcap)
        of_rows = None if bias is None else bias[at : at + _ROWS]
        yield at, logits if of_rows is None else logits + of_rows, of_rows


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Return logits within the softcap."""
    return logits if not softcap else softcap * (logits / softcap).tanh()


def _by_keys(logits: Tensor, bias: Tensor | None, level: Level) -> tuple[Tensor, ...]:
    of_bias = logits.new_zeros(logits.shape[0], level.keys.shape[0])
    if bias is not None:
        of_bias = _in_blocks(bias, level, "sum") / level.keys.clamp(min=1.0)
    low, high = (_in_blocks(logits, level, kind) for kind in ("amin", "amax"))
    # Within its range, whatever rounding makes of it.
    mean = (_in_blocks(logits, level, "sum") / level.keys.clamp(min=1.0)).clamp(low, high)
    return of_bias, mean, low, high


def _in_blocks(x: Tensor, level: Level, kind: str) -> Tensor:
    """Return the sum, the largest or the least of every block of keys, `(Lq, nk)`."""
    valid = level.block_of >= 0
    target = x.new_zeros(x.shape[0], level.keys.shape[0])
    index = level.block_of[valid].expand(x.shape[0], -1)
    return target.scatter_reduce_(1, index, x[:, valid], kind, include_self=kind == "sum")


def _by_norms(query: Tensor, key: Tensor, level: Level, scale: float, bias: Tensor | None) -> Ranges:
    """Bound how far a logit is from the mean by norms: `|<q, k - mean>| <= |q| |k - mean|`."""
    means = block_means(key, level)
    product = scale * (query @ means.T)
    away = abs(scale) * norms(query)[:, None] * radii(key, means, level)
    if bias is None:
        return Ranges(product, torch.zeros_like(product), product, product - away, product + away)
    of_bias = _in_blocks(bias, level, "sum") / level.keys.clamp(min=1.0)
    low, high = (
        product + sign * away + _in_blocks(bias, level, kind) for sign, kind in ((-1.0, "amin"), (1.0, "amax"))
    )
    return Ranges(product, of_bias, (product + of_bias).clamp(low, high), low, high)


def log_chord(mean: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return a bound of `log mean exp(x)` for numbers x with this mean between these bounds, less their mean.

    exp is convex, so it lies below its chord from `low` to `high`, and the mean of the chord is known. Never above
    `(high - low)^2 / 8`, Hoeffding's bound, nor above `high - mean`.
    """
    above, width = high - mean, high - low
    share = (above / width.clamp(min=math.ulp(0.0))).clamp(0.0, 1.0)  # of `low`
    return (above + torch.log1p(share * torch.expm1(-width))).clamp(min=0.0).minimum(above)
