"""A metric of all heads as an array, layers by heads, beside null models."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .._arrays import Floats
from ..table import Table

OBSERVED = "value"

AMOUNTS = ("most", "a part", "little")

_KEPT = {"positional_entropy": ("shuffled",)}
"""Null models that have the numbers of the model by construction, and so explain nothing, by metric."""


class Nearest(NamedTuple):
    """The null model that comes nearest to the heads."""

    name: str
    away: float
    """How far heads are from it, on average."""
    apart: float
    """How far heads are from the mean of all heads, on average."""
    span: float
    """How far the means of the null models are apart, at most."""

    @property
    def explains(self) -> str:
        """How much of what is seen the null model explains, in words; one of `AMOUNTS`.

        To say something of single heads it must be nearer than the mean of all heads. But where heads hardly differ, a
        distance that is small beside that of the null models from each other is enough.
        """
        most, part, little = AMOUNTS
        yardstick = max(self.apart, 0.1 * self.span)
        return little if self.away >= yardstick else part if self.away > 0.5 * yardstick else most


class HeadGrid(NamedTuple):
    """A metric of every head; NaN where a layer has no such head, or the metric is not defined."""

    values: Floats
    """`(layers, heads)`."""
    nulls: dict[str, Floats]
    """By null model, each `(layers, heads)`."""
    kept: tuple[str, ...] = ()
    """Null models that have the values by construction."""

    def nearest_null(self) -> Nearest | None:
        """Return the null model that comes nearest; None where nothing can be compared."""
        away = {name: np.abs(self.values - null) for name, null in self.nulls.items() if name not in self.kept}
        means = {name: float(np.nanmean(x)) for name, x in away.items() if not np.isnan(x).all()}
        if not means:
            return None
        name = min(means, key=lambda each: means[each])
        apart = float(np.nanmean(np.abs(self.values - np.nanmean(self.values))))
        of_nulls = [mean(null) for null in self.nulls.values() if not np.isnan(null).all()]
        return Nearest(name, means[name], apart, max(of_nulls) - min(of_nulls))

    def mean(self) -> float:
        """Return the mean over all heads; NaN if there is none."""
        return mean(self.values)


def mean(values: Floats) -> float:
    """Return the mean of what is not NaN; NaN if nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def layer_means(values: Floats) -> Floats:
    """Return the mean over the heads of each layer."""
    return np.array([mean(row) for row in values])


def head_grid(table: Table, metric: str) -> HeadGrid:
    """Return a metric of all heads of a table; layers are in the table's order."""
    layers = list(dict.fromkeys(record.layer for record in table))
    heads = 1 + max((record.head for record in table if record.head is not None), default=0)
    found = {name: np.full((len(layers), heads), np.nan) for name in (OBSERVED, *table.nulls())}
    place = {layer: i for i, layer in enumerate(layers)}
    for record in table:
        if record.metric == metric and record.head is not None:
            for name, value in (record.nulls | {OBSERVED: record.value}).items():
                found[name][place[record.layer], record.head] = value
    return HeadGrid(found.pop(OBSERVED), found, _KEPT.get(metric, ()))


def scales(table: Table) -> list[str]:
    """Return the names of the wavelet scales that the table has, from the coarsest to the finest."""
    prefix = "wavelet_energy_"
    names = {record.metric.removeprefix(prefix) for record in table if record.metric.startswith(prefix)}
    return sorted(names, key=lambda name: (name[0] == "d", -int(name[1:])))
