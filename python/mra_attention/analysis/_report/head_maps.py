"""The exact attention of a head as a picture, and how much of it lies in the blocks that a plan chooses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import functional
from ...config import MRAConfig
from .. import maps
from .._arrays import Bools, Floats
from ..attention_call import AttentionCall
from ..heads import SampledCall, Sampling
from .subject import with_heads

MOST_PIXELS = 256


class HeadMap(NamedTuple):
    """The attention of a head in the first sequence of a call."""

    weights: Floats
    """`(rows, columns)`: mean weights of the pairs of a pixel, queries by keys."""
    chosen: Bools
    """`(rows, columns)`: where the middle of the pixel is computed exactly."""
    shape: tuple[int, int]
    """Queries and keys."""
    density: float
    """The share of exact blocks among those that the rows of the plan see."""
    held: float
    """The share of attention in the blocks."""
    best: float
    """The share in as many blocks of each row that hold most."""
    chance: float
    """The share in as many blocks of each row at random, on average."""


def map_head(call: AttentionCall, head: int, config: MRAConfig) -> HeadMap:
    """Return the map of a head of a call that has all its queries.

    Parameters
    ----------
    call : AttentionCall
        The call.
    head : int
        The head of the query.
    config : MRAConfig
        How blocks are chosen.
    """
    call = with_heads(call, [head])
    given = {name: value for name, value in call.arguments().items() if name != "sinks"}
    mask = functional.plan(call.query, call.key, config=config, **given).block_masks()[0][0]
    queries = SampledCall(call, Sampling(0, None)).queries(0)
    shape = call.query.shape[-2], call.key.shape[-2]
    steps = -(-shape[0] // MOST_PIXELS), -(-shape[1] // MOST_PIXELS)
    image = torch.zeros(-(-shape[0] // steps[0]), -(-shape[1] // steps[1]), dtype=torch.float64)
    blocks = _Blocks(mask, shape, config.block_size)
    for some in maps.rows(maps.take_queries(call, queries), 0, 0):
        blocks.add(some)
        columns = _sums(some.values, torch.arange(shape[1]) // steps[1], image.shape[1])
        image.index_add_(0, some.queries // steps[0], columns)
    middles = [
        (torch.arange(size) * step + step // 2).clamp(max=length - 1)
        for size, step, length in zip(image.shape, steps, shape, strict=True)
    ]
    return HeadMap(
        (image / (steps[0] * steps[1])).numpy(),
        blocks.chosen(*middles).numpy(),
        shape,
        *blocks.shares(),
    )


class _Blocks:
    """Sums of weights over the blocks of a plan."""

    def __init__(self, mask: Tensor, shape: tuple[int, int], block_size: int) -> None:
        self._mask = mask
        self._of_tokens = mask.shape[0] == shape[0]
        self._self_attention = shape[0] == shape[1]
        self._length = shape[0]
        self._size = block_size
        self._first: int | None = None
        self._mass = torch.zeros(mask.shape, dtype=torch.float64)
        self._seen = torch.zeros(mask.shape, dtype=torch.float64)

    def add(self, some: maps.Rows) -> None:
        """Add rows of weights; the first ones have the first valid key."""
        if self._first is None:
            self._first = int(some.visible.any(0).to(torch.uint8).argmax())
        columns = self.column(torch.arange(some.values.shape[1]))
        rows = self.row(some.queries)
        count = self._mask.shape[1]
        self._mass.index_add_(0, rows, _sums(some.values, columns, count))
        self._seen.index_add_(0, rows, _sums(some.visible.double(), columns, count))

    def column(self, keys: Tensor) -> Tensor:
        """Return the blocks of keys; keys of padding get those at the ends."""
        return ((keys - (self._first or 0)) // self._size).clamp(0, self._mask.shape[1] - 1)

    def row(self, queries: Tensor) -> Tensor:
        """Return the rows of the plan that queries have."""
        if self._of_tokens:
            return queries
        first = (self._first or 0) if self._self_attention else 0
        # Padded queries in front of the first valid one may have blocks of their own.
        front = max(0, self._mask.shape[0] + (first - self._length) // self._size)
        return ((queries - first) // self._size + front).clamp(0, self._mask.shape[0] - 1)

    def chosen(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return bool `(queries, keys)`: which pairs are in chosen blocks."""
        return self._mask[self.row(queries)][:, self.column(keys)]

    def shares(self) -> tuple[float, float, float, float]:
        """Return density, held, best and chance."""
        live = (self._seen > 0).sum(1)
        chosen = (self._mask & (self._seen > 0)).sum(1)
        total = float(self._mass.sum())
        ranked = self._mass.sort(1, descending=True).values.cumsum(1)
        best = torch.where(chosen > 0, ranked.gather(1, (chosen - 1).clamp(min=0)[:, None])[:, 0], 0.0)
        by_chance = self._mass.sum(1) * chosen / live.clamp(min=1)
        found = (self._mass * self._mask).sum(), best.sum(), by_chance.sum()
        held, most, chance = (float(x) / total if total else float("nan") for x in found)
        return int(chosen.sum()) / max(int(live.sum()), 1), held, most, chance


def _sums(values: Tensor, places: Tensor, count: int) -> Tensor:
    """Sum columns that have the same place, `(R, count)`."""
    return values.new_zeros(values.shape[0], count).index_add_(1, places, values)
