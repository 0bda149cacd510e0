"""Time against the length, and error against time, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from ..speed.report import machine
from .measure import SDPA, Point, Time


def draw_times(path: Path, rows: Sequence[Time]) -> None:
    """Draw the time of forward and backward against the length, SDPA's beside it, dashed where it is extrapolated."""
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for axes, causal in zip(panels, (False, True), strict=True):
        chosen = [row for row in rows if row.causal == causal]
        _sdpa_curve(axes, [row for row in chosen if row.setting == SDPA])
        for name in dict.fromkeys(row.setting for row in chosen if row.setting != SDPA):
            curve = [row for row in chosen if row.setting == name]
            axes.plot([row.length for row in curve], [row.seconds for row in curve], marker="o", label=name)
        _finish(axes, sorted({row.length for row in chosen}))
        axes.set_title("causal" if causal else "every token sees all others")
    panels[0].set_ylabel("forward + backward, seconds")
    figure.suptitle(machine(), fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _sdpa_curve(axes: Axes, rows: Sequence[Time]) -> None:
    solid = [row for row in rows if row.measured]
    dashed = [solid[-1], *(row for row in rows if not row.measured)]
    line = axes.plot([row.length for row in solid], [row.seconds for row in solid], marker="o", label=SDPA)
    axes.plot(
        [row.length for row in dashed],
        [row.seconds for row in dashed],
        linestyle="--",
        color=line[0].get_color(),
        label="SDPA, extrapolated" if len(dashed) > 1 else None,
    )


def _finish(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set_xlabel("tokens")
    axes.grid(alpha=0.3)
    axes.legend()


def draw_comparisons(path: Path, points: Sequence[Point]) -> None:
    """Draw error against time of ladders and of two levels, one panel for each data and form."""
    groups = list(dict.fromkeys((point.data, point.causal, point.length) for point in points))
    figure, panels = pyplot.subplots(
        1, len(groups), figsize=(5.5 * len(groups), 4.5), layout="constrained", squeeze=False
    )
    for axes, group in zip(panels[0], groups, strict=True):
        chosen = [point for point in points if (point.data, point.causal, point.length) == group]
        for family in dict.fromkeys(_family(point) for point in chosen):
            curve = sorted((p for p in chosen if _family(p) == family), key=lambda p: p.both)
            axes.plot([p.both for p in curve], [p.error for p in curve], marker="o", label=family)
        data, causal, length = group
        axes.set_title(f"{data}, {length} tokens, {'causal' if causal else 'full'}")
        axes.set(xlabel="forward + backward, seconds", ylabel="relative error", xscale="log", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.suptitle(machine(), fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _family(point: Point) -> str:
    """Return the name without the exact blocks of a row."""
    name = point.setting
    return name.rsplit(" and ", 1)[0] + " refined" if " and " in name else name.rsplit(", ", 1)[0]
