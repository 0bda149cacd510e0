"""How the choices that the paper leaves open change its metrics, in trained heads and in null models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from mra_attention.analysis import analyze
from tqdm import tqdm

from . import statistics
from .columns import TRAINED, Columns, columns
from .sources import Group
from .statistics import Estimate

NULLS = ("uniform", "shuffled")


def _spectrum(**keywords: Any) -> dict[str, Any]:
    return {"options": {"power_spectral_density": keywords}}


SPECTRAL_METRICS = ("band_shares", "frequency_selectivity", "entropies", "entropy_correlation")
SPECTRAL: dict[str, dict[str, Any]] = {
    "each row, Hann's window": {},
    "each row, no window": _spectrum(window=None),
    "each row, Hann's window, less its mean": _spectrum(demean=True),
    "each row, no window, less its mean": _spectrum(window=None, demean=True),
    "mean row, Hann's window": {"reduction": "mean"},
    "mean row, no window, less its mean": {"reduction": "mean", **_spectrum(window=None, demean=True)},
    "last row, Hann's window": {"reduction": "last"},
}
"""What a signal is, and its spectrum."""

SENSITIVITY: dict[str, dict[str, Any]] = {
    f"{sampling}, {compare}": {"options": {"scale_sensitivity": {"sampling": sampling, "compare": compare}}}
    for sampling in ("prefix", "stride")
    for compare in ("energy", "truncate", "resample")
}
"""Which tokens are kept, and how transforms of two lengths are compared."""


@dataclass
class Choice:
    """A metric with a choice: its mean over heads."""

    group: str
    choice: str
    metric: str
    model: str
    mean: Estimate


def choices(group: Group, rows: int) -> list[Choice]:
    """Return the metrics of the spectrum, and scale sensitivity, with every choice."""
    todo = [(name, SPECTRAL_METRICS, given) for name, given in SPECTRAL.items()]
    todo += [(name, ("scale_sensitivity",), given) for name, given in SENSITIVITY.items()]
    found: list[Choice] = []
    for name, metrics, given in tqdm(todo, desc=f"choices, {group.name}", unit="choice"):
        found += _choice(group, name, metrics, given, rows)
    return found


def _choice(group: Group, name: str, metrics: tuple[str, ...], given: Mapping[str, Any], rows: int) -> list[Choice]:
    table = analyze(group.trained, metrics=metrics, nulls=NULLS, max_rows=rows, progress=False, **given)
    numbers = columns(table)
    _compare_alphas(numbers)
    return [
        Choice(group.name, name, metric, model, statistics.mean(values))
        for (metric, model), values in numbers.values.items()
    ]


MORE = "sensitivity_more_at_0.25"


def _compare_alphas(numbers: Columns) -> None:
    """Add of each head whether it is more sensitive to a quarter of the tokens than to half of them."""
    for model in (TRAINED, *NULLS):
        half, quarter = (numbers.values.get((f"scale_sensitivity_{alpha}", model)) for alpha in ("0.5", "0.25"))
        if half is not None and quarter is not None:
            numbers.values[MORE, model] = np.where(np.isnan(half + quarter), np.nan, 1.0 * (quarter > half))
