"""Recommended budgets: what they save and what they cost."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np

from ..._arrays import Floats
from ..budget_findings import TARGETS, BudgetFindings
from ..document import Code, Figure, Grid, Picture, Section
from ..drawing import drawing
from ..findings import Findings
from ..palette import NULLS, OBSERVED, VERMILION
from ..plots import head_map, legend_below, logarithmic_percent, number, percent, share
from .words import difference


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
                _layers(given),
                *_configs(found, given),
            ),
        )
    ]


def _paragraphs(given: BudgetFindings) -> list[str]:
    chosen = given.calibration
    budget, alike = given.cheapest_alike(given.target)
    every = "every block" if math.isinf(budget) else f"{number(budget)} blocks per row"
    return [
        "Budgets are chosen by calibrate: a head gets more blocks where that saves more error for its cost than it "
        "would elsewhere, until the mean error over all heads is at most the target.",
        f"For a mean error of {share(given.target)} the recommended budgets take "
        f"{share(chosen.cost / chosen.exact_cost)} of the floating-point operations of exact attention; their mean "
        f"error here is {share(chosen.error)}. One budget for all heads of those that were tried, that keeps the same "
        f"error is {every}, at {share(alike.cost)}.",
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
                "every block" if math.isinf(budget) else number(budget),
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


def _of_heads(given: BudgetFindings) -> list[list[float]]:
    """Return the recommended budgets of each layer, one for each head."""
    found: list[list[float]] = []
    for layer in given.calibration.layers.values():
        budgets = layer.config.budgets()[0]
        found.append(budgets * (len(layer.errors) if len(budgets) == 1 else 1))
    return found


def _budget_map(found: Findings, given: BudgetFindings) -> Picture:
    rows = _of_heads(given)
    values: Floats = np.full((len(rows), max(map(len, rows))), np.nan)
    text: list[list[str]] = []
    for place, (layer, row) in enumerate(zip(given.calibration.layers, rows, strict=True)):
        blocks = max(
            -(-call.key.shape[-2] // found.config.block_size) for call in found.subject.calls if call.layer == layer
        )
        values[place, : len(row)] = [min(budget, blocks) for budget in row]
        text.append([f"{min(budget, blocks):g}" for budget in row])
    heads = [found.subject.heads[place] for place in given.places]
    fits = values.shape[1] <= 16 and values.shape[0] <= 16
    return head_map(
        "budget-map",
        values,
        heads,
        title="recommended budget",
        unit="blocks per row",
        limits=(0.0, None),
        text=text if fits else None,
    )


def _layers(given: BudgetFindings) -> Grid:
    rows = [
        (
            str(place),
            " ".join("all" if math.isinf(budget) else f"{budget:g}" for budget in budgets),
            share(math.fsum(layer.errors) / len(layer.errors)),
            share(layer.cost / layer.exact_cost),
        )
        for place, (layer, budgets) in enumerate(zip(given.calibration.layers.values(), _of_heads(given), strict=True))
    ]
    return Grid(
        "Recommended budgets, layer by layer",
        ("Layer", "Blocks per row, by head", "Mean error", "Operations, of exact"),
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
