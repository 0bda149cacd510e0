"""Scalograms: the energy of a row of attention by place and scale."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .. import nulls
from .._arrays import Bools, Floats, normalized
from ..attention_call import AttentionCall
from ..heads import SampledCall, Sampling
from ..wavelets import wavelet_coefficients


class Scalogram(NamedTuple):
    """A row of attention, and where its energy is."""

    query: int
    """The position of the query among the `N` keys, from the first to the last that it sees."""
    row: Floats
    """`(N,)`."""
    distance_alone: Floats
    """`(N,)`: the row of the null model "alibi"."""
    names: list[str]
    """Of the scales, from the finest to the coarsest."""
    energy: Floats
    """`(scales, N)`: the share of the row's energy in the coefficient at this place, per token."""
    shuffled: Floats
    """The same of the null model "shuffled"."""


def scalogram_of(call: AttentionCall, head: int, seed: int) -> Scalogram | None:
    """Return the scalogram of the query in the middle of the first sequence; None if no query sees a key."""
    found = SampledCall(call, Sampling(0, 3)).rows(0, head)
    if found is None:
        return None
    middle = slice(found.positions.size // 2, found.positions.size // 2 + 1)
    seen = found.visible[middle][0].nonzero()[0]
    keys = slice(int(seen[0]), int(seen[-1]) + 1)
    row, visible = normalized(found.weights[middle, keys]), found.visible[middle, keys]
    position = found.positions[middle] - keys.start
    names, energy = _energy(row[0])
    return Scalogram(
        query=int(position[0]),
        row=row[0],
        distance_alone=nulls.alibi_rows(visible, position, nulls.alibi_slope(head, call.query.shape[1]))[0],
        names=names,
        energy=energy,
        shuffled=_energy(_shuffled(row, visible, seed))[1],
    )


def _shuffled(row: Floats, visible: Bools, seed: int) -> Floats:
    return nulls.shuffled_rows(row, visible, np.random.default_rng(seed))[0]


def _energy(row: Floats) -> tuple[list[str], Floats]:
    """Return the names of the scales, the finest first, and the energy at each place, every coefficient spread out."""
    coefficients = wavelet_coefficients(row)
    size = row.shape[0]
    spread = [_stretched(scale**2, size) for scale in reversed(coefficients.scales)]
    energy = np.stack(spread)
    return coefficients.names[::-1], energy / energy.sum()


def _stretched(values: Floats, size: int) -> Floats:
    """Spread coefficients evenly over the tokens, without changing their sum by more than rounding of places."""
    places = np.arange(size) * values.shape[0] // size
    return values[places] * (values.shape[0] / size)
