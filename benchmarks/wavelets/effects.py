"""What a metric of trained heads is beside null models, and how it changes with depth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import statistics
from .columns import TRAINED, Columns
from .statistics import Estimate, Floats


@dataclass
class Effect:
    """A metric of the trained heads beside that of another model."""

    group: str
    metric: str
    model: str
    mean: Estimate
    """Of the other model."""
    difference: Estimate
    """Trained less the other model, mean over heads."""
    above: float
    """Share of the heads where the trained one has more."""
    explained: Estimate
    """Spearman's correlation over heads of the trained and the other model; NaN if that is the same for all."""


@dataclass
class Trend:
    """How a metric goes with depth, as Spearman's correlations over heads."""

    group: str
    metric: str
    model: str
    level: Estimate
    """Of the metric and the number of the layer."""
    spread: Estimate
    """Of the distance to the layer's mean and the number of the layer."""


def effects(group: str, columns: Columns) -> list[Effect]:
    """Return every metric beside every model."""
    return [
        _effect(group, metric, model, columns.values[metric, TRAINED], columns.values[metric, model])
        for metric in columns.metrics()
        for model in columns.models()
    ]


def _effect(group: str, metric: str, model: str, trained: Floats, other: Floats) -> Effect:
    known = ~(np.isnan(trained) | np.isnan(other))
    trained, other = trained[known], other[known]
    above = float((trained > other).mean()) if trained.size else float("nan")
    explained = statistics.correlation(trained, other)
    return Effect(group, metric, model, statistics.mean(other), statistics.mean(trained - other), above, explained)


def trends(group: str, columns: Columns) -> list[Trend]:
    """Return how every metric of every model goes with depth."""
    found: list[Trend] = []
    depth = columns.layers.astype(np.float64)
    for metric in columns.metrics():
        for model in columns.models():
            values = columns.values[metric, model]
            spread = np.abs(values - _layer_means(values, columns))
            level = statistics.correlation(values, depth)
            found.append(Trend(group, metric, model, level, statistics.correlation(spread, depth)))
    return found


def _layer_means(values: Floats, columns: Columns) -> Floats:
    means = np.full(values.shape, np.nan)
    for layer in np.unique(columns.layers):
        here = (columns.layers == layer) & ~np.isnan(values)
        if here.any():
            means[here] = values[here].mean()
    return means
