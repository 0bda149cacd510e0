"""The metrics of all heads as arrays, one number for each head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from mra_attention.analysis import Table

from .sources import layer_number
from .statistics import Floats, Ints

TRAINED, UNTRAINED = "trained", "untrained"


@dataclass(frozen=True)
class Columns:
    """Metrics of the heads of a group, in the order of layers and heads."""

    layers: Ints
    """(n,): the depth of each head's layer."""
    values: dict[tuple[str, str], Floats]
    """(n,) by metric and model: "trained", "untrained", or a null model of the trained one."""

    def metrics(self) -> list[str]:
        """Return the names of the metrics."""
        return list(dict.fromkeys(metric for metric, _ in self.values))

    def models(self) -> list[str]:
        """Return the names of the models, the trained one first."""
        return list(dict.fromkeys(model for _, model in self.values))


def columns(trained: Table, untrained: Table | None = None) -> Columns:
    """Return the metrics of heads of two tables of the same layers; those of whole layers are left out."""
    values: dict[tuple[str, str], Floats] = {}
    of_heads = [record for record in trained if record.head is not None]
    fresh = {(record.layer, record.head, record.metric): record.value for record in untrained or ()}
    for metric in dict.fromkeys(record.metric for record in of_heads):
        chosen = [record for record in of_heads if record.metric == metric]
        values[metric, TRAINED] = np.array([record.value for record in chosen])
        for null in trained.nulls():
            values[metric, null] = np.array([record.nulls[null] for record in chosen])
        if fresh:
            values[metric, UNTRAINED] = np.array([fresh[record.layer, record.head, metric] for record in chosen])
    first = of_heads[0].metric
    layers = np.array([layer_number(record.layer) for record in of_heads if record.metric == first])
    return Columns(layers, values)
