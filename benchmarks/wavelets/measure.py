"""All that is measured of a group of heads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from mra_attention.analysis import analyze

from .choices import Choice, choices
from .columns import TRAINED, Columns, columns
from .effects import Effect, Trend, effects, trends
from .prediction import HeadError, LeftOut, Prediction, by_head, errors, predictions
from .sources import Group

OPTIONS = {"wavelet_energy": {"normalize": True}}
"""Energies as shares, as those of bands are: the energy of a row as such is how narrow it is."""


@dataclass
class HeadMetric:
    """The metrics of a trained head, and its errors by the number of blocks."""

    group: str
    layer: int
    head: int
    values: dict[str, float]


@dataclass
class Found:
    """What a group of heads has shown."""

    name: str
    columns: Columns
    effects: list[Effect]
    trends: list[Trend]
    choices: list[Choice]
    errors: list[HeadError]
    predictions: list[Prediction]

    def heads(self) -> list[HeadMetric]:
        """Return the metrics and errors of each trained head, to six digits; what is not defined is left out."""
        numbers = {metric: self.columns.values[metric, TRAINED] for metric in self.columns.metrics()}
        for blocks in dict.fromkeys(error.blocks for error in self.errors):
            here = [error for error in self.errors if error.blocks == blocks]
            numbers |= {f"{name}_at_{blocks}": by_head(here, name) for name in ("error", *LeftOut._fields)}
        result: list[HeadMetric] = []
        for place, layer in enumerate(self.columns.layers.tolist()):
            values = {name: float(f"{x[place]:.6g}") for name, x in numbers.items() if np.isfinite(x[place])}
            result.append(HeadMetric(self.name, layer, int((self.columns.layers[:place] == layer).sum()), values))
        return result


def measure(group: Group, rows: int) -> Found:
    """Return metrics beside null models, depth, choices, and errors, with this many rows of a head and sequence."""
    trained = analyze(group.trained, max_rows=rows, options=OPTIONS)
    fresh = analyze(group.untrained, nulls=(), max_rows=rows, options=OPTIONS)
    numbers = columns(trained, fresh)
    found = errors(group.name, group.trained, group.budgets)
    return Found(
        group.name,
        numbers,
        effects(group.name, numbers),
        trends(group.name, numbers),
        choices(group, rows),
        found,
        predictions(group.name, found, numbers),
    )
