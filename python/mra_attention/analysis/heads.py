"""Some rows of the attention matrix of a head, evenly spaced, with who sees whom: what metrics and null models get."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import maps
from ._arrays import Bools, Floats, Ints
from .attention_call import AttentionCall
from .attention_map import AttentionMap
from .pairs import Pairs

Source = AttentionCall | AttentionMap


class HeadRows(NamedTuple):
    """Rows of the attention matrix of a head in one sequence, from the first key that one of them sees to the last."""

    weights: Floats
    """`(R, N)`."""
    visible: Bools
    """`(R, N)`."""
    positions: Ints
    """`(R,)`: the positions of the queries among the `N` keys."""


class Sampling(NamedTuple):
    """Which rows are looked at."""

    first_row: int
    max_rows: int | None


def shape_of(source: Source) -> tuple[int, int]:
    """Return the numbers of sequences and of heads."""
    tensor = source.query if isinstance(source, AttentionCall) else source.weights
    return tensor.shape[0], tensor.shape[1]


class SampledCall:
    """The rows of a call.

    Left out are queries that are padding, as in docs/definitions.md, section 6, and those that see no key.
    """

    def __init__(self, call: AttentionCall, sampling: Sampling) -> None:
        self._pairs = Pairs(call)
        self._sampling = sampling
        self._queries: dict[int, Tensor] = {}

    def queries(self, batch: int) -> Tensor:
        """Return int64 `(R,)`: the numbers of the queries of a sequence that are looked at."""
        if batch not in self._queries:
            valid, _ = self._pairs.valid(batch)
            self._queries[batch] = _spread(self._pairs.queries[valid], self._sampling)
        return self._queries[batch]

    def rows(self, batch: int, head: int) -> HeadRows | None:
        """Return the rows of a head; None if there are none."""
        queries = self.queries(batch)
        places = torch.searchsorted(self._pairs.queries, queries)
        parts = [*maps.weights_of_rows(self._pairs, batch, head, places, maps.CHUNK, torch.float64)]
        if not parts:
            return None
        weights, visible = (torch.cat([part[i] for part in parts]) for i in (1, 2))
        return _cropped(weights, visible, queries + self._pairs.offset)


class SampledMap:
    """The rows of an attention matrix that see a key."""

    def __init__(self, given: AttentionMap, sampling: Sampling) -> None:
        self._map = given
        self._sampling = sampling

    def rows(self, batch: int, head: int) -> HeadRows | None:
        """Return the rows of a head; None if there are none."""
        weights, visible = self._map.weights, self._map.visible
        seen = torch.ones((), dtype=torch.bool) if visible is None else visible
        queries = _spread(torch.arange(weights.shape[2]), self._sampling)
        seen = seen.expand(weights.shape)[batch, head][queries]
        return _cropped(weights[batch, head][queries].detach().double(), seen, queries)


def _spread(index: Tensor, sampling: Sampling) -> Tensor:
    """Return those from the first row on, or as many of them, evenly spaced, the first and the last among them."""
    index = index[index >= sampling.first_row]
    size, wanted = index.shape[0], sampling.max_rows
    if wanted is None or size <= wanted:
        return index
    if wanted == 1:
        return index[-1:]
    return index[torch.arange(wanted) * (size - 1) // (wanted - 1)]


def _cropped(weights: Tensor, visible: Tensor, positions: Tensor) -> HeadRows | None:
    """Return the rows that see a key, and the keys from the first that one of them sees to the last."""
    sees = visible.any(-1)
    weights, visible, positions = weights[sees], visible[sees], positions[sees]
    seen = visible.any(0).nonzero()
    if not seen.numel():
        return None
    keys = slice(int(seen[0]), int(seen[-1]) + 1)
    return HeadRows(
        weights[:, keys].numpy(), visible[:, keys].numpy(), (positions - keys.start).numpy().astype(np.int64)
    )
