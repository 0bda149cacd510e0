"""Error against time of every setting, and error against the entropy of the rows, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot

from ..speed.report import machine
from .curves import Point
from .entropy import METHODS, Head, curve


def draw_settings(path: Path, points: Sequence[Point]) -> None:
    """Draw error against time, one panel for each set of heads and one curve for each setting."""
    names = list(dict.fromkeys(point.data for point in points))
    figure, panels = pyplot.subplots(1, len(names), figsize=(6 * len(names), 5), layout="constrained", squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        chosen = [point for point in points if point.data == name]
        for setting in dict.fromkeys(point.setting for point in chosen):
            line = [point for point in chosen if point.setting == setting]
            times, errors = [1e3 * point.seconds for point in line], [point.error for point in line]
            axes.plot(times, errors, marker="o", markersize=4, label=setting)
        axes.set(title=name, xlabel="forward of a layer, one thread, ms", ylabel="relative error of the output")
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.suptitle(machine(), fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_entropy(path: Path, heads: Sequence[Head], title: str) -> None:
    """Draw error against entropy: each head as a dot, and the curve of each method."""
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    entropies = np.linspace(min(head.entropy for head in heads), max(head.entropy for head in heads), 100)
    for name in METHODS:
        chosen = [head for head in heads if head.method == name]
        line = axes.plot(entropies, curve(chosen, entropies), label=name)[0]
        axes.scatter([h.entropy for h in chosen], [h.error for h in chosen], s=4, alpha=0.25, color=line.get_color())
    axes.set(title=title, xlabel="entropy of the rows, nats", ylabel="relative error of the output", ylim=(0, 1.3))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.suptitle(machine(), fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
