"""The time of budgets chosen on one text, for another text, beside that of one budget for all at the same error."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from mra_attention import MRAConfig, scaled_dot_product_attention
from mra_attention.analysis import AttentionCall, BudgetCurve
from mra_attention.analysis.budget_curves import measure
from mra_attention.analysis.budget_frontier import Point, frontier
from mra_attention.analysis.calibration import chosen_layer
from tqdm import tqdm

from .data import Case

Curves = Sequence[Sequence[Sequence[BudgetCurve]]]
"""Of each layer, each setting, each head."""


@dataclass
class Row:
    """Budgets chosen on one text, tested on another.

    What is saved is a share of the time of the best uniform budget that has the same error on the other text: one
    setting and one budget for all heads and layers, interpolated between budgets.
    """

    data: str
    free: str
    """What is chosen: for heads their budgets, for layers their settings."""
    target: float
    error: float
    """On the other text."""
    saved: float
    """Of the best uniform budget of all block sizes with else the defaults."""
    saved_alike: float
    """Of the best uniform budget of the settings that are free."""
    expected: float
    """As before, if a head costs its share of a call in which all heads have its budget."""
    expected_at_best: float
    """As before, if budgets are chosen on the text on which they are tested."""


class Uniform(NamedTuple):
    """One setting and one budget for all heads of all layers."""

    config: MRAConfig
    error: float
    cost: float


class Bracket(NamedTuple):
    """The uniform budgets of a setting around an error, and the cost between them."""

    cost: float
    less: Uniform
    more: Uniform
    share: float
    """Of the way from the smaller to the larger budget."""

    def seconds(self, of: Mapping[MRAConfig, float]) -> float:
        """Return the time between the two."""
        return of[self.less.config] ** (1 - self.share) * of[self.more.config] ** self.share


def curves_of(calls: Sequence[AttentionCall], case: Case) -> Curves:
    """Return the errors of every head of every layer, for all settings, with floating-point operations as costs."""
    return [measure([call], case.settings, case.budgets, "flops") for call in calls]


def rows_of(case: Case, chosen_on: Curves, tested_on: Curves, rounds: int) -> list[Row]:
    """Return a row for each freedom and each target."""
    call = case.tested_on[0]
    uniform = {replace(c.config, blocks_per_row=b): 0 for of in tested_on[0] for c in of[:1] for b in c.budgets}
    seconds = thread_seconds(call, [*uniform], rounds)
    chosen_on, tested_on = (_with_seconds(curves, seconds) for curves in (chosen_on, tested_on))
    sizes = _only(tested_on, case.sizes)
    pairs: list[tuple[Row, list[MRAConfig], Bracket, Bracket]] = []
    for (free, configs), target in itertools.product(case.freedoms().items(), case.targets):
        known, other = _only(chosen_on, configs), _only(tested_on, configs)
        point = _within(known, target)
        error, cost = _elsewhere(point, other)
        default, alike = best_uniform(sizes, error), best_uniform(other, error)
        expected = 1 - cost / alike.cost, 1 - _within(other, error).cost / alike.cost
        row = Row(case.name, free, target, error, 0, 0, *expected)
        pairs.append((row, [chosen_layer(*choice).config for choice in point.choice], default, alike))
    again = {config: 0 for _, configs, *brackets in pairs for config in (*configs, *_ends(brackets))}
    seconds = thread_seconds(call, [*again], rounds)
    for row, configs, default, alike in pairs:
        chosen = statistics.fmean(seconds[config] for config in configs)
        row.saved, row.saved_alike = (1 - chosen / bracket.seconds(seconds) for bracket in (default, alike))
    return [row for row, *_ in pairs]


def _ends(brackets: Sequence[Bracket]) -> list[MRAConfig]:
    return [end.config for bracket in brackets for end in (bracket.less, bracket.more)]


def _with_seconds(curves: Curves, seconds: Mapping[MRAConfig, float]) -> Curves:
    """Return the curves with seconds as costs: of a call in which all heads have the budget, a head's share."""

    def timed(curve: BudgetCurve, heads: int) -> BudgetCurve:
        costs = (seconds[replace(curve.config, blocks_per_row=budget)] / heads for budget in curve.budgets)
        return replace(curve, costs=tuple(costs))

    return [[[timed(curve, len(heads)) for curve in heads] for heads in layer] for layer in curves]


def _only(curves: Curves, configs: Sequence[MRAConfig]) -> Curves:
    return [[heads for heads in layer if heads[0].config in configs] for layer in curves]


def _within(curves: Curves, target: float) -> Point:
    heads = sum(len(layer[0]) for layer in curves)
    return next(point for point in frontier(curves) if point.error <= target * heads)


def _elsewhere(point: Point, curves: Curves) -> tuple[float, float]:
    """Return mean error and cost of a choice on other curves."""
    errors: list[float] = []
    cost = 0.0
    for (chosen, places), layer in zip(point.choice, curves, strict=True):
        (heads,) = (heads for heads in layer if heads[0].config == chosen[0].config)
        errors += [curve.errors[i] for curve, i in zip(heads, places, strict=True)]
        cost += sum(curve.costs[i] for curve, i in zip(heads, places, strict=True))
    return statistics.fmean(errors), cost


def best_uniform(curves: Curves, error: float) -> Bracket:
    """Return the cheapest setting with one budget for all heads; logarithms lie on lines between budgets."""
    found: list[Bracket] = []
    for at in range(len(curves[0])):
        heads = [curve for layer in curves for curve in layer[at]]
        steps: list[Uniform] = []
        for i, budget in enumerate(heads[0].budgets[:-1]):
            mean = statistics.fmean(curve.errors[i] for curve in heads)
            config = replace(heads[0].config, blocks_per_row=budget)
            steps.append(Uniform(config, mean, sum(curve.costs[i] for curve in heads)))
        for less, more in itertools.pairwise(steps):
            if more.error <= error < less.error:
                share = math.log(less.error / error) / math.log(less.error / more.error)
                found.append(Bracket(less.cost ** (1 - share) * more.cost**share, less, more, share))
    return min(found, key=lambda bracket: bracket.cost)


@torch.inference_mode()
def thread_seconds(call: AttentionCall, configs: Sequence[MRAConfig], rounds: int) -> dict[MRAConfig, float]:
    """Return the seconds of a layer with each config, medians of calls in turns.

    They are CPU time, from which company on the machine takes little. All configs are timed on one layer: the time
    follows from the budgets.
    """
    torch.set_num_threads(1)  # the time of the thread that calls is all there is
    taken: dict[MRAConfig, list[float]] = {config: [] for config in configs}
    arguments: Any = call.arguments()
    for _ in tqdm(range(rounds + 1), unit="round", leave=False):
        for config, times in taken.items():
            before = time.thread_time()
            scaled_dot_product_attention(call.query, call.key, call.value, config=config, **arguments)
            times.append(time.thread_time() - before)
    return {config: statistics.median(times[1:]) for config, times in taken.items()}
