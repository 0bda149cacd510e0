"""Errors against budgets, and the budgets that meet a target: all that the report asks of `calibrate` and estimates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...config import MRAConfig
from .. import nulls
from ..attention_call import AttentionCall
from ..budget_curves import BudgetCurve
from ..budget_frontier import frontier
from ..calibrating import calibrate
from ..calibration import Calibration
from ..estimate import error_estimate
from .head_grid import mean
from .subject import with_heads

TARGETS = (0.2, 0.1, 0.05, 0.02, 0.01)
ESTIMATED_BUDGETS = (2.0, 8.0)


class Trade(NamedTuple):
    """A way to compute all heads."""

    error: float
    """The mean over heads."""
    cost: float
    """As a share of that of exact attention."""


class Estimate(NamedTuple):
    """The mean error of the heads of a layer, from some of its queries, with a confidence interval."""

    budget: float
    error: float
    low: float
    high: float


@dataclass(frozen=True)
class BudgetFindings:
    """Errors and budgets of some heads of all layers."""

    target: float
    calibration: Calibration
    places: list[int]
    """Which heads were measured."""
    random: dict[str, list[BudgetCurve]]
    """Of queries and keys drawn at random, for each layer, with the first candidate."""
    best: list[Trade]
    """From the cheapest to the most exact, with budgets for every head."""
    alike: dict[MRAConfig, list[tuple[float, Trade]]]
    """With one budget for all heads: every budget, and what it does, for each candidate."""
    estimates: dict[str, list[Estimate]]

    def curves(self, layer: str) -> dict[MRAConfig, list[BudgetCurve]]:
        """Return the curves of a layer, of the heads of each candidate."""
        found: dict[MRAConfig, list[BudgetCurve]] = {}
        for curve in self.calibration.curves:
            if curve.layer == layer:
                found.setdefault(curve.config, []).append(curve)
        return found

    def cheapest(self, target: float) -> Trade:
        """Return the cheapest way that keeps a target."""
        return next(trade for trade in self.best if trade.error <= target)

    def cheapest_alike(self, target: float) -> tuple[float, Trade]:
        """Return the budget, given to all heads with one of the candidates, that keeps a target at the least cost."""
        found = (each for trades in self.alike.values() for each in trades if each[1].error <= target)
        return min(found, key=lambda each: each[1].cost)


def measure_budgets(
    calls: Sequence[AttentionCall], places: list[int], candidates: Sequence[MRAConfig], target: float, seed: int
) -> BudgetFindings:
    """Measure errors at budgets.

    Parameters
    ----------
    calls : sequence of AttentionCall
        With all their queries.
    places : list of int
        Which of their heads to measure.
    candidates : sequence of MRAConfig
        As for `calibrate`.
    target : float
        The mean error that the recommended budgets keep.
    seed : int
        Of the random null model and of the queries of which errors are estimated.
    """
    calls = [with_heads(call, [place for place in places if place < call.query.shape[1]]) for call in calls]
    calibration = calibrate(calls, target_error=target, candidates=candidates)
    layers = list(calibration.layers)
    of_layers = [[call for call in calls if call.layer == layer] for layer in layers]
    drawn = [nulls.random_call(call, seed + at) for at, call in enumerate(calls)]
    random: dict[str, list[BudgetCurve]] = {layer: [] for layer in layers}
    for curve in calibrate(drawn, target_error=target, candidates=candidates[:1]).curves:
        random[curve.layer].append(curve)
    findings = BudgetFindings(
        target,
        calibration,
        places,
        random,
        [],
        {},
        {layer: _estimates(some, candidates[0], seed) for layer, some in zip(layers, of_layers, strict=True)},
    )
    findings.best.extend(_best(findings, layers))
    findings.alike.update((config, _alike(findings, layers, config)) for config in candidates)
    return findings


def mean_curve(curves: Sequence[BudgetCurve]) -> tuple[list[float], list[float]]:
    """Return budgets and the mean errors of heads where these are not 0, as they are with every block."""
    errors = zip(*(curve.errors for curve in curves), strict=True)
    means = [math.fsum(some) / len(curves) for some in errors]
    points = [point for point in zip(curves[0].budgets, means, strict=True) if point[1] > 0.0]
    return [budget for budget, _ in points], [error for _, error in points]


def _best(findings: BudgetFindings, layers: Sequence[str]) -> list[Trade]:
    points = frontier([[*findings.curves(layer).values()] for layer in layers])
    heads = sum(len(layer.errors) for layer in findings.calibration.layers.values())
    exact = findings.calibration.exact_cost
    return [Trade(point.error / heads, point.cost / exact) for point in points]


def _alike(findings: BudgetFindings, layers: Sequence[str], config: MRAConfig) -> list[tuple[float, Trade]]:
    curves = list(itertools.chain.from_iterable(findings.curves(layer)[config] for layer in layers))
    budgets = sorted({budget for curve in curves for budget in curve.budgets})
    exact = findings.calibration.exact_cost
    found: list[tuple[float, Trade]] = []
    for budget in budgets:
        # Where a layer has fewer blocks than the budget, it gets every block, the last rung of its ladder.
        places = [
            next((i for i, rung in enumerate(curve.budgets) if rung >= budget), len(curve.budgets) - 1)
            for curve in curves
        ]
        errors = [curve.errors[i] for curve, i in zip(curves, places, strict=True)]
        cost = sum(curve.costs[i] for curve, i in zip(curves, places, strict=True))
        found.append((budget, Trade(math.fsum(errors) / len(errors), cost / exact)))
    return found


def _estimates(calls: Sequence[AttentionCall], config: MRAConfig, seed: int) -> list[Estimate]:
    """Estimate the mean error of the heads of a layer: the mean over sequences, of the limits too."""
    blocks = -(-max(call.key.shape[-2] for call in calls) // config.block_size)
    found: list[Estimate] = []
    for budget in ESTIMATED_BUDGETS:
        if budget < blocks:
            means = torch.cat([error_estimate(call, config, blocks_per_row=budget, seed=seed).mean for call in calls])
            found.append(Estimate(budget, *(mean(column.numpy()) for column in means.T)))
    return found
