"""The best budgets for every total cost: what a head gains by more blocks is weighed against all other heads."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .budget_curves import BudgetCurve


class Point(NamedTuple):
    """A way to compute something, with what it costs."""

    cost: float
    error: float
    """The sum of the errors of heads."""
    choice: Any
    """Of a head a place on its curve, of a layer its curves and their places, of a model the choices of its layers."""


def frontier(layers: Sequence[Sequence[Sequence[BudgetCurve]]]) -> list[Point]:
    """Return the best points from the cheapest to the most exact one, each of them a choice for every layer.

    Parameters
    ----------
    layers : sequence of sequence of sequence of BudgetCurve
        For each layer and each of its configs the curves of its heads.

    Returns
    -------
    list of Point
        The vertices of the lower convex hull of all combinations: no combination that costs as much has a smaller
        error, but for those between two vertices, which are one head, or one layer, apart.
    """
    return _sums([_layer(configs) for configs in layers])


def _layer(configs: Sequence[Sequence[BudgetCurve]]) -> list[Point]:
    points: list[Point] = []
    for curves in configs:
        heads = [_hull(map(Point, curve.costs, curve.errors, itertools.count())) for curve in curves]
        points.extend(point._replace(choice=(curves, point.choice)) for point in _sums(heads))
    return _hull(points)


def _hull(points: Iterable[Point]) -> list[Point]:
    """Return the vertices of the lower convex hull, from the cheapest one down to the smallest error."""
    found: list[Point] = []
    for point in sorted(points, key=lambda point: point[:2]):
        if found and point.error >= found[-1].error:
            continue
        while len(found) > 1 and _slope(found[-2], point) <= _slope(found[-2], found[-1]):
            found.pop()
        found.append(point)
    return found


def _sums(hulls: Sequence[Sequence[Point]]) -> list[Point]:
    """Return the vertices of the hull of all sums of one point of each hull.

    Its edges are those of the hulls in the order of their slopes: the step that saves most error for its cost is first.
    """
    at = [0] * len(hulls)
    edges = [(_slope(*hull[i : i + 2]), which) for which, hull in enumerate(hulls) for i in range(len(hull) - 1)]
    points = [_sum(hulls, at)]
    for _, which in sorted(edges):
        at[which] += 1
        points.append(_sum(hulls, at))
    return points


def _sum(hulls: Sequence[Sequence[Point]], at: Sequence[int]) -> Point:
    chosen = [hull[i] for hull, i in zip(hulls, at, strict=True)]
    return Point(
        sum(point.cost for point in chosen),
        sum(point.error for point in chosen),
        tuple(point.choice for point in chosen),
    )


def _slope(cheaper: Point, better: Point) -> float:
    return (better.error - cheaper.error) / (better.cost - cheaper.cost)
