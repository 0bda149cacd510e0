"""Error against time of every setting, and error against the entropy of the rows, as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot

from ..speed.report import machine
from .curves import Point
from .entropy import Head, curve


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


def draw_entropy(path: Path, swept: Mapping[str, Sequence[Head]]) -> None:
    """Draw error against entropy, one panel for each title: each head as a dot, and the curve of each method."""
    figure, panels = pyplot.subplots(1, len(swept), figsize=(7 * len(swept), 5), layout="constrained", squeeze=False)
    for axes, (title, heads) in zip(panels[0], swept.items(), strict=True):
        every = [head.entropy for head in heads]
        entropies = np.linspace(min(every), max(every), 100)
        for name in dict.fromkeys(head.method for head in heads):
            chosen = [head for head in heads if head.method == name]
            color = axes.plot(entropies, curve(chosen, entropies), label=name)[0].get_color()
            axes.scatter([h.entropy for h in chosen], [h.error for h in chosen], s=4, alpha=0.25, color=color)
        axes.set(title=title, xlabel="entropy of the rows, nats", ylabel="relative error of the output", ylim=(0, 1.3))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(machine(), fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
