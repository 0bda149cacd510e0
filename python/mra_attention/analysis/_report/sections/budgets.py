"""Recommended budgets: what they save and what they cost."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any, NamedTuple

import numpy as np

from ..._arrays import Floats
from ..budget_findings import TARGETS, BudgetFindings, Trade
from ..document import Code, Figure, Grid, Picture, Section
from ..drawing import drawing
from ..findings import Findings
from ..palette import NULLS, OBSERVED, VERMILION
from ..plots import head_map, legend_below, logarithmic_percent, number, percent, share
from .words import difference

MOST_WRITTEN = 16
"""Layers and heads of a map whose cells have room for numbers."""


def budgets(found: Findings) -> list[Section]:
    """Return the section; none where errors were not measured."""
    given = found.budgets
    if given is None:
        return []
    return [
        Section(
            "budgets",
            "Recommended budgets",
            _paragraphs(given),
            (
                _targets(given),
                Figure(
                    "Error against cost",
                    (_trades(given),),
                    "The line is what the best budgets for every head reach, the marks are one budget for all heads, "
                    "from 1 block per row to every block. The gap between the two is what knowing the heads is worth. "
                    "Costs are floating-point operations as a share of those of exact attention.",
                ),
                Figure(
                    f"Budgets for a mean error of {share(given.target)}",
                    (_budget_map(found, given),),
                    "Bright cells are heads that need many blocks per row; dark ones do with few. Numbers are blocks "
                    "per row, where there is room for them.",
                ),
                _layers(found, given),
                *_configs(found, given),
            ),
        )
    ]


def _paragraphs(given: BudgetFindings) -> list[str]:
    chosen = given.calibration
    budget, alike = given.cheapest_alike(given.target)
    return [
        "Budgets are chosen by calibrate: a head gets more blocks where that saves more error for its cost than it "
        "would elsewhere, until the mean error over all heads is at most the target.",
        f"For a mean error of {share(given.target)} the recommended budgets take "
        f"{share(chosen.cost / chosen.exact_cost)} of the floating-point operations of exact attention; their mean "
        f"error here is {share(chosen.error)}. The cheapest budget for all heads alike, among those that were tried, "
        f"is {_blocks(budget, alike)}, at {share(alike.cost)}.",
        "What is saved in time is less than what is saved in operations, the more so the shorter the text; and on "
        "another text the error will be another one. An error of attention is not yet one of the model: "
        "calibrate(target_loss=..., loss=...) chooses budgets by what the model is used for.",
    ]


def _targets(given: BudgetFindings) -> Grid:
    rows: list[tuple[str, ...]] = []
    for target in sorted({*TARGETS, given.target}, reverse=True):
        best = given.cheapest(target)
        budget, alike = given.cheapest_alike(target)
        rows.append(
            (
                share(target),
                share(best.error),
                share(best.cost),
                f"{1.0 / best.cost:.2f} times less",
                _blocks(budget, alike),
                share(alike.cost),
            )
        )
    return Grid(
        "What targets cost",
        (
            "Mean error, at most",
            "Mean error here",
            "Operations, of exact",
            "That is",
            "One budget for all heads",
            "Its operations",
        ),
        rows,
        "With budgets for every head, and in the last two columns with one for all heads, of the budgets that were "
        "tried.",
    )


def _trades(given: BudgetFindings) -> Picture:
    alt = "Mean error against cost: budgets by head, and one budget for all heads"
    with drawing("trades", alt, (5.6, 3.4)) as drawn:
        axes = drawn.figure.subplots()
        best = [trade for trade in given.best if trade.error > 0.0]
        style = NULLS["uniform"]
        for (config, trades), marker in zip(given.alike.items(), itertools.cycle("sD^v")):
            alike = [trade for _, trade in trades if trade.error > 0.0]
            axes.plot(
                [t.cost for t in alike],
                [t.error for t in alike],
                color=style.color,
                linestyle=style.line,
                marker=marker,
                markersize=3.5,
                label=f"null: one budget for all heads{difference(config, given.alike)}",
            )
        axes.plot([t.cost for t in best], [t.error for t in best], color=OBSERVED, label="budgets by head")
        chosen = given.calibration
        if chosen.error > 0.0:
            axes.plot(
                [chosen.cost / chosen.exact_cost],
                [chosen.error],
                "o",
                color=VERMILION,
                markersize=6,
                label=f"recommended, for {share(given.target)}",
            )
        axes.set(
            title="mean error of all heads",
            xlabel="cost, share of exact attention",
            ylabel="relative error",
            yscale="log",
            xlim=(0.0, None),
        )
        floor = (
            min((t.error for _, trades in given.alike.items() for _, t in trades if t.error > 0.0), default=1e-3) / 10.0
        )
        axes.set_ylim(max(floor, 1e-6), None)
        percent(axes.xaxis)
        logarithmic_percent(axes.yaxis)
        axes.grid(True)
        legend_below(axes, 1 if len(given.alike) > 1 else 3)
    return drawn.picture


def _blocks(budget: float, trade: Trade) -> str:
    # Without an error there is nothing but every block, whatever its number is in each layer.
    return "every block" if trade.error == 0.0 else f"{number(budget)} blocks per row"


class _LayerBudgets(NamedTuple):
    key_blocks: int
    of_heads: list[float]


def _layer_budgets(found: Findings, given: BudgetFindings) -> list[_LayerBudgets]:
    """Return the recommended budgets of each layer, none above the number of its key blocks."""
    result: list[_LayerBudgets] = []
    for name, layer in given.calibration.layers.items():
        longest = max(call.key.shape[-2] for call in found.subject.calls if call.layer == name)
        key_blocks = -(-longest // layer.config.block_size)
        budgets = layer.config.budgets()[0]
        of_heads = budgets * len(layer.errors) if len(budgets) == 1 else budgets
        result.append(_LayerBudgets(key_blocks, [min(budget, float(key_blocks)) for budget in of_heads]))
    return result


def _budget_map(found: Findings, given: BudgetFindings) -> Picture:
    rows = _layer_budgets(found, given)
    values: Floats = np.full((len(rows), max(len(row.of_heads) for row in rows)), np.nan)
    for place, row in enumerate(rows):
        values[place, : len(row.of_heads)] = row.of_heads
    heads = [found.subject.heads[place] for place in given.places]
    text = [[f"{budget:g}" for budget in row.of_heads] for row in rows]
    return head_map(
        "budget-map",
        values,
        heads,
        title="recommended budget",
        unit="blocks per row",
        limits=(0.0, None),
        text=text if max(values.shape) <= MOST_WRITTEN else None,
    )


def _layers(found: Findings, given: BudgetFindings) -> Grid:
    rows = [
        (
            str(place),
            str(budgets.key_blocks),
            " ".join(f"{budget:g}" for budget in budgets.of_heads),
            share(math.fsum(layer.errors) / len(layer.errors)),
            share(layer.cost / layer.exact_cost),
        )
        for place, (layer, budgets) in enumerate(
            zip(given.calibration.layers.values(), _layer_budgets(found, given), strict=True)
        )
    ]
    return Grid(
        "Recommended budgets, layer by layer",
        ("Layer", "Key blocks", "Blocks per row, by head", "Mean error", "Operations, of exact"),
        rows,
        folded=True,
    )


def _configs(found: Findings, given: BudgetFindings) -> list[Code]:
    if len(given.places) < found.subject.of_heads:
        return []
    configs: dict[str, Any] = {name: config.to_dict() for name, config in given.calibration.configs.items()}
    lines = (
        "import json",
        "from mra_attention import MRAConfig",
        "",
        f"configs = json.loads({json.dumps(configs)!r})",
        "layers = {name: MRAConfig.from_dict(settings) for name, settings in configs.items()}",
    )
    return [Code("The recommended budgets as Python, a config for each layer", "\n".join(lines))]
