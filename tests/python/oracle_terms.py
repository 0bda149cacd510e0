"""The terms of every query's softmax: keys of exact blocks, and coarse blocks (docs/definitions.md, 3.6 and 4.5)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from oracle_geometry import Geometry, Settings
from torch import Tensor


class Item(NamedTuple):
    """A batch item with heads expanded, and zeros where nothing is to be read: NaN stored there cannot spread."""

    g: Geometry
    query: Tensor
    query_mean: Tensor
    key: Tensor
    key_mean: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None
    """(H)."""
    first_order: bool
    """Whether coarse blocks are expanded around the mean query: the block form alone has that."""
    coarse_shift: float

    @property
    def block_counts(self) -> Tensor:
        """(nk): how many times a coarse block counts."""
        return self.g.count.to(self.query.dtype) * math.exp(self.coarse_shift)

    def products(self, query: Tensor, key: Tensor) -> Tensor:
        """The scaled products, bounded by the softcap."""
        product = self.scale * (query @ key.transpose(-1, -2))
        return product if self.softcap is None else self.softcap * (product / self.softcap).tanh()

    def slopes(self, query: Tensor, key: Tensor) -> Tensor | float:
        """The derivatives of the bounded products with respect to the scaled ones."""
        return 1.0 if self.softcap is None else 1.0 - (self.products(query, key) / self.softcap) ** 2

    @property
    def rows(self) -> Tensor:
        """What stands for every row: the mean of its queries, or a token."""
        return self.query_mean if self.g.form == "block" else self.query

    @property
    def coarse_logits(self) -> Tensor:
        """(H, rows, nk): the logit of every block for every row, selected or not."""
        return self.products(self.rows, self.key_mean) + self.g.mean_bias.to(self.query.dtype)

    @property
    def logits(self) -> Tensor:
        """(H, Lq, Lk): the logit of every pair."""
        return self.products(self.query, self.key) + self.g.bias.to(self.query.dtype)


def mean(x: Tensor, member: Tensor) -> Tensor:
    """The means (..., blocks, D) of some of the tokens (..., L, D)."""
    return (member.to(x.dtype) @ x) / member.sum(-1).clamp(min=1)[:, None].to(x.dtype)


def repeat(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[0] == heads else x.repeat_interleave(heads // x.shape[0], dim=0)


def clean(x: Tensor, wanted: Tensor) -> Tensor:
    return torch.where(wanted[..., None], x, torch.zeros((), dtype=x.dtype))


def item_of(
    query: Tensor,
    key: Tensor,
    settings: Settings,
    g: Geometry,
    dtype: torch.dtype,
    active: Tensor | None = None,
) -> Item:
    """One batch item. Queries that are not active, (H, Lq), are read for the means of their blocks alone."""
    heads, _, dim = query.shape
    query = clean(query.to(dtype), g.answers)
    key = repeat(clean(key.to(dtype), g.key_valid), heads)
    some = g.visible.any(-1)
    # A row that nobody active reads may hold anything.
    used = g.pooled[None].expand(heads, -1, -1)
    if active is not None:
        some = some & active
        in_row = (g.row_of == torch.arange(g.pooled.shape[0])[:, None]) & active[:, None]
        used = used & in_row.any(-1, keepdim=True)
    readable = clean(query, used.any(1))
    query_mean = mean(readable, g.pooled)
    scale = 1.0 / math.sqrt(max(dim, 1)) if settings.scale is None else settings.scale
    sinks = None if settings.sinks is None else settings.sinks.to(dtype)
    first_order = settings.coarse == "first_order" and g.form == "block"
    key_mean, shift = mean(key, g.member), settings.coarse_shift
    query = clean(query, some)
    return Item(g, query, query_mean, key, key_mean, scale, settings.softcap, sinks, first_order, shift)


def cropped(selected: Tensor, g: Geometry) -> Tensor:
    return selected[:, : g.is_open.shape[1], : g.is_open.shape[2]]


def of_queries(rows: Tensor, g: Geometry) -> Tensor:
    """(H, Lq, nk) from (H, rows, nk): what every query's row says; without a row, nothing."""
    if rows.shape[1] == 0:
        return rows.new_zeros(rows.shape[0], g.row_of.shape[0], rows.shape[2])
    return rows[:, g.row_of]


class Terms(NamedTuple):
    """The terms of every query's softmax: keys of exact blocks, (H, Lq, Lk), and coarse blocks, (H, Lq, nk)."""

    keys: Tensor
    blocks: Tensor
    block_logits: Tensor
    count: Tensor
    """How often the logit of a block counts, (nk)."""


def exact_of(g: Geometry, selected: Tensor) -> Tensor:
    """(H, rows, nk) bool: what a selection makes exact, or refines."""
    return cropped(selected, g) & g.is_open | g.is_cut


def terms_of(x: Item, selected: Tensor, mode: str, candidates: Tensor | None = None) -> Terms:
    """The terms of a level; `candidates`, (H, rows, nk), are the blocks that the level above leaves to it."""
    g = x.g
    exact = of_queries(exact_of(g, selected), g)
    coarse = (of_queries(g.is_open, g) & ~exact) & g.visible.any(-1, keepdim=True)
    if candidates is not None:
        coarse &= of_queries(candidates, g)
    if mode == "sparse":
        coarse = torch.zeros_like(coarse)
    keys = (exact.double() @ g.member.double() > 0) & g.visible
    if x.first_order:
        once = math.exp(x.coarse_shift) * torch.ones_like(x.block_counts)
        return Terms(keys, coarse, first_order_logits(x), once)
    return Terms(keys, coarse, of_queries(x.coarse_logits, g), x.block_counts)


class Within(NamedTuple):
    """What the mean query of every row attends to within each block: section 3.8."""

    weights: Tensor
    """(H, rows, nk, Lk): `a`, 0 at keys of other blocks."""
    entropy: Tensor
    """(H, rows, nk)."""


def within_blocks(x: Item) -> Within:
    logits = x.scale * (x.query_mean @ x.key.transpose(-1, -2))
    of_block = logits[:, :, None].masked_fill(~x.g.member, -math.inf)
    empty = ~x.g.member.any(-1, keepdim=True)
    logarithms = of_block.masked_fill(empty, 0.0).log_softmax(-1)
    weights = logarithms.exp().masked_fill(empty, 0.0)
    return Within(weights, -(weights * logarithms.masked_fill(~x.g.member, 0.0)).sum(-1))


def by_row(of_rows: Tensor, g: Geometry) -> Tensor:
    """(H, Lq, nk, D) from (H, rows, nk, D)."""
    if of_rows.shape[1] == 0:
        return of_rows.new_zeros(of_rows.shape[0], g.row_of.shape[0], *of_rows.shape[2:])
    return of_rows[:, g.row_of]


def first_order_logits(x: Item) -> Tensor:
    """(H, Lq, nk): the logit of every block for every query."""
    weights, entropy = within_blocks(x)
    keys = by_row(weights @ x.key[:, None], x.g)
    offsets = of_queries(entropy + x.g.mean_bias.to(entropy.dtype), x.g)
    return x.scale * (keys @ x.query[..., None]).squeeze(-1) + offsets


def block_values(x: Item, weights: Tensor, value: Tensor) -> Tensor:
    """(H, Lq, Dv): the values of coarse blocks with the weights that they have, (H, Lq, nk)."""
    if not x.first_order:
        return weights @ mean(value, x.g.member)
    values = by_row(within_blocks(x).weights @ value[:, None], x.g)
    return (weights[..., None, :] @ values).squeeze(-2)
