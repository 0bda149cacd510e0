"""Budgets for every head of a model, chosen from data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

from ..config import MRAConfig
from .attention_call import AttentionCall
from .budget_curves import Cost, measure
from .budget_frontier import Point, frontier
from .calibration import Calibration, chosen_layer
from .calibration_arguments import by_layer, check_candidates, check_cost, checked_budgets, the_target

Loss = Callable[[dict[str, MRAConfig]], float]


def calibrate(
    calls: Sequence[AttentionCall],
    *,
    target_error: float | None = None,
    speedup: float | None = None,
    target_loss: float | None = None,
    loss: Loss | None = None,
    candidates: Sequence[MRAConfig] = (MRAConfig(),),
    budgets: Sequence[float] | None = None,
    cost: Cost = "flops",
) -> Calibration:
    """Choose a budget for every head from what attention was given, and a config for every layer.

    Each head is computed with several budgets, and its output compared with that of exact attention. From the smallest
    budgets on, the head that saves most error for its cost gets the next larger one, until the target is met. So a
    head that errs little with few blocks leaves its share to one that needs them.

    Parameters
    ----------
    calls : sequence of AttentionCall
        What the layers of a model were given, for some text as it is used: the budgets fit its length and its masks.
        Calls with the same `layer` are one layer, with one number of heads. Tensors may have any layout and dtype that
        `mra_attention.scaled_dot_product_attention` takes.
    target_error : float, optional
        The mean error that is allowed, at least 0; the cheapest configs that keep it are chosen. The error of a head is
        `||out - exact|| / ||exact||` of its whole output for an item of a batch, mean over items and calls; the mean
        is over all heads of all layers.
    speedup : float, optional
        What exact attention is to cost, as a multiple of what the configs cost, at least 1; those with the smallest
        mean error are chosen.
    target_loss : float, optional
        The largest value of `loss` that is allowed; the cheapest configs that keep it are chosen, of those with the
        smallest mean error for their cost. Exactly one of the three targets is given.
    loss : callable, optional
        With `target_loss`: `loss(configs)` runs the model with a config for each layer and returns a number that grows
        with the errors. It is called about ten times: the configs are found by bisection.
    candidates : sequence of MRAConfig, default (MRAConfig(),)
        How a layer may be approximated, but for its budget, which is what is chosen: configs of two resolutions, with
        `blocks_per_row` and `num_blocks` at their defaults. A layer gets the one that serves it best. Try `coarse` and
        `coarse_shift` before block sizes.
    budgets : sequence of float, optional
        The values of `blocks_per_row` that are tried beside every block, ascending; by default 1, 1.5, 2, 3, 4, 6, ...
    cost : {"flops", "seconds"}, default "flops"
        What a config costs. "flops": the products that `torch.utils.flop_counter` counts, those of logits, exact and
        pooled, and of values. The choice is then the same on every machine, but leaves out what a call takes beside
        its products. "seconds", the fastest of a few calls with as many threads as torch has, suits candidates that
        differ in block size or `coarse`. A head costs its share of a call in which all heads have its budget.

    Returns
    -------
    Calibration
        A config for each layer, what they cost and how large the errors are, and the curves from which they were
        chosen.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If there is not exactly one target, a value is not accepted, `loss` is not met with every block, or a result
        is not finite.
    NotImplementedError, TypeError, ValueError
        If attention refuses a call with one of the candidates.

    Notes
    -----
    A layer in which every head needs every block has `blocks_per_row=inf`. Where only some heads do, these have as many
    blocks as there were in the longest call. Of all combinations of budgets and candidates those on the lower convex
    hull of error and cost are looked at, which are one step of one head, or another candidate of a layer, apart. On
    the calls themselves the mean error is the one that is given, up to rounding, since heads do not influence each
    other; on other data it is not the same. docs/analysis.md has what that gains and costs on two models.

    Deterministic with `cost="flops"` and a deterministic `loss`. Nothing is differentiated.

    Examples
    --------
    >>> import torch
    >>> from mra_attention.analysis import AttentionCall, calibrate
    >>> call = AttentionCall(*torch.randn(3, 1, 2, 256, 32), layer="encoder.0")
    >>> calibration = calibrate([call], speedup=2)
    >>> calibration.speedup >= 2
    True
    """
    name, target = the_target(target_error, speedup, target_loss, loss)
    check_candidates(candidates)
    check_cost(cost)
    tried = checked_budgets(budgets)
    layers = by_layer(calls)
    curves = {layer: measure(of_layer, candidates, tried, cost) for layer, of_layer in layers.items()}
    points = frontier([*curves.values()])

    def calibration(point: Point) -> Calibration:
        chosen = {layer: chosen_layer(*choice) for layer, choice in zip(curves, point.choice, strict=True)}
        flat = itertools.chain.from_iterable(itertools.chain.from_iterable(curves.values()))
        return Calibration(layers=chosen, cost_unit=cost, curves=tuple(flat))

    if name == "target_loss":
        return _with_loss(points, calibration, cast("Loss", loss), target)
    if name == "speedup":
        return calibration(_affordable(points, calibration(points[-1]).exact_cost, target))
    heads = sum(len(of_layer[0]) for of_layer in curves.values())
    return calibration(next(point for point in points if point.error <= target * heads))


def _affordable(points: Sequence[Point], exact_cost: float, speedup: float) -> Point:
    """Return the last point that is so many times cheaper than exact attention."""
    affordable = [point for point in points if point.cost * speedup <= exact_cost]
    if not affordable:
        most = exact_cost / points[0].cost
        raise ValueError(f"speedup={speedup} is more than the smallest budgets give, which is {most:.4g}")
    return affordable[-1]


def _with_loss(
    points: Sequence[Point], calibration: Callable[[Point], Calibration], loss: Loss, target: float
) -> Calibration:
    """Return the calibration of the first point, by bisection, with a loss that is small enough."""
    found: dict[int, Calibration] = {}

    def loss_at(at: int) -> float:
        tried = calibration(points[at])
        found[at] = replace(tried, loss=float(loss(tried.configs)))
        return cast("float", found[at].loss)

    low, high = 0, len(points) - 1
    if not (least := loss_at(high)) <= target:
        raise ValueError(f"target_loss={target} is not met by the loss with the smallest errors, {least:.6g}")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if loss_at(middle) <= target else (middle + 1, high)
    return found[high]
