"""Error and time of every setting at every budget, and the errors at equal time."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from .data import Heads
from .settings import FromKeys

LEAST_TOKENS = 4096
"""Of a timed call: a shorter layer is copied, so that a call takes some milliseconds."""


@dataclass
class Point:
    """What a setting costs at a budget."""

    data: str
    causal: bool
    setting: str
    keys: int
    """Exact keys of a query."""
    seconds: float
    """CPU time of one thread, forward, for one layer."""
    error: float
    """Relative error of the output, mean over heads and layers."""


def measure(heads: Heads, settings: Mapping[str, FromKeys], budgets: Sequence[int], rounds: int) -> list[Point]:
    """Return the points of all settings: medians of calls in turns, on the last layer."""
    copies = max(1, LEAST_TOKENS // heads.length)
    query, key, value = (x.repeat(copies, 1, 1, 1) for x in heads.layers[-1])
    variants = [(name, keys) for name in settings for keys in budgets]
    taken: dict[tuple[str, int], list[float]] = {variant: [] for variant in variants}
    for _ in tqdm(range(rounds + 1), desc=heads.name, unit="round", leave=False):
        for name, keys in variants:
            attention = heads.attention(settings[name](keys))
            before = time.thread_time()
            attention(query, key, value, heads.scale)
            taken[name, keys].append(time.thread_time() - before)
    points: list[Point] = []
    for name, keys in tqdm(variants, desc="errors", unit="setting", leave=False):
        seconds = statistics.median(taken[name, keys][1:]) / copies
        points.append(Point(heads.name, heads.causal, name, keys, seconds, heads.error(settings[name](keys))))
    return points


def check(heads: Heads) -> None:
    """Compare attention with every block exact with the exact output.

    Raises
    ------
    AssertionError
        If the error is above the tolerance.
    """
    error = heads.error({"blocks_per_row": math.inf})
    if not error <= 1e-5:
        raise AssertionError(f"{heads.name}, every block exact: error {error:.1e} > 1e-05")


def at_time(points: Sequence[Point], seconds: float) -> float | None:
    """Return the error of a setting at a time, its logarithm interpolated; None where no budget is as fast.

    Beyond the largest budget it is the error of that one.
    """
    points = sorted(points, key=lambda point: point.seconds)
    if seconds < points[0].seconds:
        return None
    for left, right in itertools.pairwise(points):
        if seconds <= right.seconds:
            share = (seconds - left.seconds) / (right.seconds - left.seconds)
            return math.exp((1 - share) * math.log(left.error) + share * math.log(right.error))
    return points[-1].error
