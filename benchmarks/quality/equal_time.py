"""The errors of the package's coarse terms at equal time."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from typing import NamedTuple

import torch
from mra_attention import scaled_dot_product_attention as mra
from torch import Tensor

TERMS = ("mean", "first_order")
BUDGETS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0)
BATCH = 8
"""Copies of a layer in a timed call, which then takes some milliseconds."""


class Point(NamedTuple):
    """What a budget costs with a coarse term."""

    seconds: float
    error: float


def _error(layers: list[list[Tensor]], coarse: str, budget: float) -> float:
    errors: list[float] = []
    for layer in layers:
        out = mra(*(x[None] for x in layer), blocks_per_row=budget, coarse=coarse)[0]
        exact = torch.nn.functional.scaled_dot_product_attention(*layer)
        errors.append(((out - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).mean().item())
    return statistics.mean(errors)


def measure(layers: list[list[Tensor]], rounds: int) -> dict[str, list[Point]]:
    """Return for each term the points of all budgets: median CPU time of one thread, all calls in turns."""
    batch = [x.float()[None].repeat(BATCH, 1, 1, 1) for x in layers[-1]]
    times: dict[tuple[str, float], list[float]] = {(term, budget): [] for term in TERMS for budget in BUDGETS}
    for _ in range(rounds + 1):
        for (term, budget), taken in times.items():
            before = time.thread_time()
            mra(*batch, blocks_per_row=budget, coarse=term)
            taken.append(time.thread_time() - before)
    return {
        term: [Point(statistics.median(times[term, m][1:]), _error(layers, term, m)) for m in BUDGETS] for term in TERMS
    }


def at_time(points: list[Point], seconds: float) -> float:
    """Return the error at a time, its logarithm interpolated between two budgets; before the first one, its error."""
    for left, right in itertools.pairwise(points):
        if left.seconds <= seconds <= right.seconds:
            share = (seconds - left.seconds) / (right.seconds - left.seconds)
            return math.exp((1 - share) * math.log(left.error) + share * math.log(right.error))
    return points[0].error if seconds < points[0].seconds else points[-1].error
