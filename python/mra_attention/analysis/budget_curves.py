"""What each head's error and cost are at a ladder of budgets, measured on calls of attention."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..config import MRAConfig
from ..functional import scaled_dot_product_attention
from .attention_call import AttentionCall

Cost = Literal["flops", "seconds"]

ROUNDS = 3
"""Timed calls of each budget, of which the fastest counts: company on the machine only ever slows a call."""


@dataclass(frozen=True)
class BudgetCurve:
    """Errors and costs of one head of a layer at several budgets.

    Parameters
    ----------
    layer : str
        The name of the layer.
    head : int
        The head of the query.
    config : MRAConfig
        How the layer is approximated, but for the budget.
    budgets : tuple of float
        Ascending values of `blocks_per_row`; the last one is that of every block, as many as the longest keys have.
    errors : tuple of float
        `||out - exact|| / ||exact||` at each budget: the norms are those of the head's whole output for one item of a
        batch, and their ratio is the mean over all items of all calls.
    costs : tuple of float
        Of all calls together: floating-point operations, or seconds.
    """

    layer: str
    head: int
    config: MRAConfig
    budgets: tuple[float, ...]
    errors: tuple[float, ...]
    costs: tuple[float, ...]


def ladder(key_blocks: int) -> tuple[float, ...]:
    """Return the budgets that are tried by default: 1, 1.5, 2, 3, 4, 6, 8, 12, ...

    Between two of them the error of a head changes little enough that finer steps save hardly more.
    """
    return tuple(step * 2.0**octave for octave in range(key_blocks.bit_length()) for step in (1.0, 1.5))


@torch.no_grad()
def measure(
    calls: Sequence[AttentionCall], configs: Iterable[MRAConfig], budgets: Sequence[float] | None, cost: Cost
) -> list[list[BudgetCurve]]:
    """Return for each config the curves of all heads of the layer of which these are the calls."""
    exact = [_COSTS[cost](functools.partial(_attend, call, MRAConfig(blocks_per_row=math.inf))) for call in calls]
    longest = max(call.key.shape[-2] for call in calls)
    found: list[list[BudgetCurve]] = []
    for config in configs:
        key_blocks = -(-longest // config.block_size)
        tried = (budget for budget in budgets or ladder(key_blocks) if budget < key_blocks)
        found.append(_curves(calls, exact, config, (*tried, float(key_blocks)), cost))
    return found


def _curves(
    calls: Sequence[AttentionCall],
    exact: Sequence[tuple[Tensor, float]],
    config: MRAConfig,
    budgets: tuple[float, ...],
    cost: Cost,
) -> list[BudgetCurve]:
    layer, heads = calls[0].layer, calls[0].query.shape[-3]
    errors: list[list[float]] = []
    costs: list[float] = []
    for budget in budgets[:-1]:
        budgeted = replace(config, blocks_per_row=budget)
        attended = [_COSTS[cost](functools.partial(_attend, call, budgeted)) for call in calls]
        pairs = zip(attended, exact, strict=True)
        of_items = torch.cat([_relative_errors(out, expected) for (out, _), (expected, _) in pairs])
        if not of_items.isfinite().all():
            raise ValueError(f"calls of layer {layer!r} have outputs that are not finite")
        errors.append([error.item() for error in of_items.mean(0)])
        costs.append(sum(work for _, work in attended) / heads)
    # With every block all configs are the same attention, and what is left of an error is rounding.
    errors.append([0.0] * heads)
    costs.append(sum(work for _, work in exact) / heads)
    of_heads = zip(*errors, strict=True)
    return [BudgetCurve(layer, head, config, budgets, of_head, tuple(costs)) for head, of_head in enumerate(of_heads)]


def _attend(call: AttentionCall, config: MRAConfig) -> Tensor:
    attention = cast("Callable[..., Tensor]", scaled_dot_product_attention)
    return attention(call.query, call.key, call.value, config=config, **call.arguments())


def _relative_errors(out: Tensor, exact: Tensor) -> Tensor:
    """Return the errors of every item and head, (B, H)."""
    sizes = exact.double().square().sum((-2, -1)).sqrt()
    errors = (out.double() - exact.double()).square().sum((-2, -1)).sqrt()
    # A head of which the exact output is 0, as where every key is hidden, has no relative error but 0.
    ratios = torch.where(errors == 0, errors, errors / sizes)
    return ratios.reshape(-1, ratios.shape[-1])


def _with_flops(attend: Callable[[], Tensor]) -> tuple[Tensor, float]:
    counter: Any = FlopCounterMode(display=False)
    with counter:
        out = attend()
    return out, float(counter.get_total_flops())


def _with_seconds(attend: Callable[[], Tensor]) -> tuple[Tensor, float]:
    out = attend()  # warms up
    times: list[float] = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        attend()
        times.append(time.perf_counter() - start)
    return out, min(times)


_COSTS: dict[Cost, Callable[[Callable[[], Tensor]], tuple[Tensor, float]]] = {
    "flops": _with_flops,
    "seconds": _with_seconds,
}
