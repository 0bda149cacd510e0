"""Low bands by layer, heads beside the uncertainty bound, and what goes with the errors, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot

from .columns import TRAINED, UNTRAINED
from .measure import Found
from .report import budgets
from .statistics import Estimate

STYLE = "tableau-colorblind10"
MARKERS = {TRAINED: "o", "shuffled": "x", "random": "^", "uniform": "s", UNTRAINED: "v"}

SHOWN = (
    "error_elsewhere",
    "missed_share",
    "misplaced_share",
    "missed_detail",
    "local_share",
    "positional_entropy",
    "window_entropy_32",
    "scale_sensitivity_0.5",
    "wavelet_energy_a5",
    "wavelet_energy_d1",
    "normalized_wavelet_entropy_a5",
    "low_share",
    "high_share",
    "frequency_selectivity",
    "spectral_entropy",
    "entropy_correlation",
    "uncertainty_slack",
    "reconstruction_error",
)
"""Predictors in the picture, from the top."""


def _panels(found: Sequence[Found], width: float, height: float) -> tuple[Any, Any]:
    figure, panels = pyplot.subplots(
        1, len(found), figsize=(width * len(found), height), layout="constrained", squeeze=False
    )
    for axes, of in zip(panels[0], found, strict=True):
        axes.set_title(of.name, fontsize=10)
        axes.grid(alpha=0.3)
    return figure, panels[0]


def _save(figure: Any, legend_of: Any, path: Path) -> None:
    figure.legend(*legend_of.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def draw_bands(path: Path, found: Sequence[Found]) -> None:
    """Draw the low share of each head by the layer, and the mean over heads of each model."""
    with pyplot.style.context(STYLE):
        figure, panels = _panels(found, 2.9, 3.4)
        for axes, of in zip(panels, found, strict=True):
            layers = np.unique(of.columns.layers)
            axes.axhspan(0.6, 0.8, color="0.9", zorder=0, label="the paper's 0.60 to 0.80")
            for model, marker in MARKERS.items():
                values = of.columns.values["low_share", model]
                means = [values[of.columns.layers == layer].mean() for layer in layers]
                dashes = "--" if model == "uniform" else "-"
                line = axes.plot(
                    layers, means, dashes, marker=marker, markersize=4, linewidth=1, label=f"{model}, mean"
                )
                if model == TRAINED:
                    color = line[0].get_color()
                    axes.scatter(of.columns.layers, values, s=10, alpha=0.4, color=color, label="trained, one head")
            axes.set(xlabel="layer", ylim=(0, 1.05), xticks=layers[:: 1 + len(layers) // 10])
            axes.tick_params(labelsize=7)
        panels[0].set_ylabel("share of the power in the low band")
        _save(figure, panels[0], path)


def draw_bound(path: Path, found: Sequence[Found]) -> None:
    """Draw the entropy of frequencies against that of positions, and the least sum that they may have."""
    with pyplot.style.context(STYLE):
        figure, panels = _panels(found, 2.9, 3.4)
        for axes, of in zip(panels, found, strict=True):
            values = of.columns.values
            for model in (TRAINED, "shuffled", UNTRAINED):
                x, y = (values[metric, model] for metric in ("positional_entropy", "uncertainty_frequency_entropy"))
                axes.scatter(x, y, s=12, marker=MARKERS[model], alpha=0.7, label=model)
            bound = np.median(x + y - values["uncertainty_slack", UNTRAINED])
            axes.plot([0, bound], [bound, 0], color="black", linewidth=1, label="log N, the least sum")
            axes.set(xlabel="entropy of positions, nats", ylabel="entropy of frequencies, nats")
        _save(figure, panels[0], path)


def draw_predictions(path: Path, found: Sequence[Found]) -> None:
    """Draw the correlations of predictors with the error at the first budget, over all heads and within layers."""
    with pyplot.style.context(STYLE):
        of_errors = [of for of in found if of.errors]
        figure, panels = _panels(of_errors, 3.4, 4.6)
        for axes, of in zip(panels, of_errors, strict=True):
            blocks = budgets(of)[0]
            by_name = {p.predictor: p for p in of.predictions if p.blocks == blocks}
            names = [name for name in SHOWN if name in by_name]
            for shift, marker, label in ((-0.15, "o", "all heads"), (0.15, "s", "within layers")):
                estimates = [by_name[n].overall if shift < 0 else by_name[n].within for n in names]
                _bars(axes, np.arange(len(names)) + shift, estimates, marker, label)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_xlim(-1, 1)
            axes.set_xlabel(f"rank correlation with the error, {blocks} blocks", fontsize=8)
            axes.set_yticks(range(len(names)), names if axes is panels[0] else [""] * len(names), fontsize=7)
            axes.invert_yaxis()
        _save(figure, panels[0], path)


def _bars(axes: Any, places: Any, estimates: Sequence[Estimate], marker: str, label: str) -> None:
    values, lows, highs = np.array([(e.value, e.low, e.high) for e in estimates]).T
    reach = np.maximum([values - lows, highs - values], 0.0)
    axes.errorbar(values, places, xerr=reach, fmt=marker, markersize=3, linewidth=1, label=label)
