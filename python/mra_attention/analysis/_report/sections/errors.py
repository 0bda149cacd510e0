"""Errors against budgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..._extra import require
from ..budget_findings import BudgetFindings, mean_curve
from ..document import Figure, Picture, Section
from ..drawing import drawing
from ..findings import Findings
from ..palette import NULLS, OBSERVED, VERMILION
from ..plots import layer_colors, legend_below, logarithmic_percent, share, write_ticks
from .words import difference

MOST_LAYERS = 12

_WHY_NOT = (
    "Errors, and with them budgets and blocks, are not on this page: they need all queries of the calls, and more "
    "keys than one block has. The capture has only some of the queries, or its texts are shorter than a block."
)


def errors(found: Findings) -> Section:
    """Return the section."""
    budgets = found.budgets
    if budgets is None:
        return Section("errors", "Errors at budgets", (_WHY_NOT,))
    layers = list(budgets.calibration.layers)
    shown = [i * len(layers) // min(len(layers), MOST_LAYERS) for i in range(min(len(layers), MOST_LAYERS))]
    some = "" if len(shown) == len(layers) else f" {len(shown)} of {len(layers)} layers, evenly spaced, are shown."
    return Section(
        "errors",
        "Errors at budgets",
        (
            "With a budget of so many blocks per row, the most important blocks of the attention matrix are computed "
            "exactly and the others enter through averages. The error of a head is the norm of what its output "
            "differs by from that of exact attention, divided by the norm of the latter.",
            _summary(budgets),
            "The null model is the same layer with random queries and keys of the same size: attention without "
            "structure. A layer below its line has structure that blocks catch; one above it is harder, as where "
            "logits are much larger than by chance and attention is more concentrated. Uniform attention has the "
            "error 0 at any budget, since averages say all of it.",
        ),
        (
            Figure(
                "Error against budget, all layers",
                (_all_layers(budgets),),
                "Each line is the mean over the heads of a layer, measured on the whole outputs; bright lines are "
                "later layers. Both axes are logarithmic. Further down is better; at the budget of every block the "
                "error is 0, which is beyond the right end.",
            ),
            Figure(
                "Error against budget, layer by layer",
                [_one_layer(found, budgets, layers, i) for i in shown],
                "Thin lines are heads, the thick line is their mean. Bars are what error_estimate says of that mean "
                "from 64 queries of each head, with a 95 % confidence interval: an error can be known without "
                "computing exact attention for all queries. Where few queries have most of the error, the interval may "
                "miss it." + some,
            ),
        ),
    )


def _summary(budgets: BudgetFindings) -> str:
    at_four = [trade for budget, trade in next(iter(budgets.alike.values())) if budget == 4.0]
    if not at_four:
        return "The text is shorter than 5 blocks, so budgets below all blocks are few."
    return (
        f"With 4 blocks per row in all heads, the mean error is {share(at_four[0].error)}, at "
        f"{share(at_four[0].cost)} of the floating-point operations of exact attention."
    )


def _all_layers(budgets: BudgetFindings) -> Picture:
    layers = list(budgets.calibration.layers)
    alt = f"Mean error of heads against blocks per row, a line for each of {len(layers)} layers, and random null model"
    with drawing("errors-all", alt, (5.6, 3.6)) as drawn:
        axes = drawn.figure.subplots()
        colors = layer_colors(len(layers))
        for place, layer in enumerate(layers):
            curves = next(iter(budgets.curves(layer).values()))
            axes.plot(*mean_curve(curves), color=colors.to_rgba(place), marker="o", markersize=3)
        null = NULLS["random"]
        for place, layer in enumerate(layers):
            label = f"{null.label}, a layer" if place == 0 else None
            axes.plot(
                *mean_curve(budgets.random[layer]), color=null.color, linestyle=null.line, linewidth=1, label=label
            )
        axes.plot([], [], color=colors.to_rgba(0), marker="o", markersize=3, label="a layer, mean of its heads")
        _axes_of_errors(axes)
        alike = next(iter(budgets.alike.values()))
        _limit(axes, [budget for budget, trade in alike if trade.error > 0.0], [trade.error for _, trade in alike], 4.0)
        axes.set_title("mean error of the heads of a layer")
        drawn.figure.colorbar(colors, ax=axes, label="layer").outline.set_visible(False)
        legend_below(axes, 1)
    return drawn.picture


def _one_layer(found: Findings, budgets: BudgetFindings, layers: list[str], place: int) -> Picture:
    layer = layers[place]
    candidates = budgets.curves(layer)
    curves = next(iter(candidates.values()))
    xs, ys = mean_curve(curves)
    alt = f"Error against budget of the heads of layer {place}, with means and intervals"
    with drawing(f"errors-{place}", alt, (3.1, 2.9)) as drawn:
        axes = drawn.figure.subplots()
        for curve in curves:
            axes.plot(*mean_curve([curve]), color=OBSERVED, alpha=0.35, linewidth=0.7)
        axes.plot(xs, ys, color=OBSERVED, linewidth=2, label=f"mean of heads{difference(curves[0].config, candidates)}")
        for number, (config, others) in enumerate(list(candidates.items())[1:]):
            style = ((0, (4, 1)), (0, (1, 1)), (0, (6, 1, 1, 1)))[number % 3]
            axes.plot(
                *mean_curve(others),
                color=OBSERVED,
                linestyle=style,
                label=f"mean of heads{difference(config, candidates)}",
            )
        null = NULLS["random"]
        axes.plot(*mean_curve(budgets.random[layer]), color=null.color, linestyle=null.line, label=null.label)
        for some in budgets.estimates[layer]:
            axes.errorbar(
                [some.budget],
                [some.error],
                [[some.error - some.low], [max(some.high - some.error, 0.0)]],
                color=VERMILION,
                marker="o",
                markersize=3,
                capsize=3,
                linewidth=1.2,
                label="estimate, 95 % interval" if some is budgets.estimates[layer][0] else None,
            )
        _axes_of_errors(axes)
        _limit(axes, xs, ys, 10.0)
        axes.set_title(f"layer {place}")
        legend_below(axes, 1)
    return drawn.picture


def _axes_of_errors(axes: Any) -> None:
    axes.set(xlabel="budget, blocks per row", ylabel="relative error", xscale="log", yscale="log")
    ticker = require("matplotlib.ticker", "matplotlib", "a report")
    axes.xaxis.set_major_locator(ticker.LogLocator(base=2.0, numticks=12))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    write_ticks(axes.xaxis, lambda value: f"{value:g}")
    logarithmic_percent(axes.yaxis)
    axes.grid(True)


def _limit(axes: Any, budgets: Sequence[float], errors: Sequence[float], below: float) -> None:
    """Limit the axes to some budgets, and to errors down to a part of the least one; both may be missing."""
    lowest = min((error for error in errors if error > 0.0), default=0.01)
    axes.set_ylim(max(lowest / below, 1e-6), 1.5)
    axes.set_xlim(0.9, 1.1 * max(budgets, default=2.0))
