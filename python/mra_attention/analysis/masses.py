"""Bounds of the mass of every block that is not exact: its sum of exponentials of logits, for each query."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._checks import numbers
from .._plan import Plan
from ._planned import Item, Level, Planned, item_of, planned, visible_pairs
from ._ranges import Ranges, capped, log_chord, ranges_of
from .attention_call import AttentionCall


class MassBounds(NamedTuple):
    """Of a head at a level, `(Lq, nk)` each, float64; masses as logarithms, -inf where the block is not coarse."""

    low: Tensor
    """What the mass is not below."""
    high: Tensor
    """What it is not above."""
    used: Tensor
    """What attention takes for it; -inf in the sparse mode."""
    width: Tensor
    """How far the logits of the block's keys are apart, or a bound of that; 0 where the block is not coarse."""


def mass_bounds(
    call: AttentionCall,
    plan: Plan,
    *,
    item: int = 0,
    head: int = 0,
    level: int = -1,
    ranges: Literal["keys", "norms"] = "norms",
) -> MassBounds:
    """Bound the mass of every block that is not refined, for each query of a head.

    Parameters
    ----------
    call : AttentionCall
        What attention was given, with all queries.
    plan : Plan
        Of `mra_attention.plan` for the same tensors and masks.
    item, head : int, default 0
        The batch item, and the head of the query.
    level : int, default -1
        The level, counted from the coarsest one; by default the finest one.
    ranges : {"keys", "norms"}, default "norms"
        How far logits are apart within a block: from each of them, which takes the time of exact attention, or at most
        `2 scale |q| max |k - mean|`, which takes products with means alone.

    Returns
    -------
    MassBounds
        Logarithms. Rows and columns are those of the plan's order of tokens.

    Raises
    ------
    TypeError
        If `plan` is no plan.
    ValueError
        If the plan is of other inputs, or an argument has a value that is not accepted.
    IndexError
        If there is no such item, head or level.
    NotImplementedError
        With `coarse="first_order"`, a `query_padding_mask`, and a softcap beside `ranges="norms"`.

    Notes
    -----
    Definition: docs/analysis.md, "Errors known before they are paid". The bounds hold for the given numbers in exact
    arithmetic; they are computed in float64. Deterministic.
    """
    found = planned(call, plan)
    by_norms = checked_ranges(found, ranges)
    of_item = item_of(found, range(call.query.shape[0])[item])
    return masses(found, of_item, range(call.query.shape[1])[head], of_item.levels[level], by_norms).bounds


def checked_ranges(found: Planned, ranges: Any) -> bool:
    """Check how ranges are to be found; return whether by norms."""
    numbers.check_choice("ranges", ranges, ("keys", "norms"))
    if ranges == "norms" and found.settings.softcap:
        raise NotImplementedError(
            f"softcap={found.settings.softcap} is not implemented with ranges='norms': the mean of capped logits takes "
            "every key; use ranges='keys'"
        )
    return ranges == "norms"


class LevelMasses(NamedTuple):
    """A level of a head, and what is known of it."""

    level: Level
    ranges: Ranges
    bounds: MassBounds


def masses(found: Planned, item: Item, head: int, level: Level, by_norms: bool) -> LevelMasses:
    """Return the bounds of a head at a level, and the ranges that they come from."""
    ranges = ranges_of(found, item, head, level, by_norms)
    coarse = coarse_of_queries(found, item, head, level)
    log_count = level.keys.log()
    # Convexity of exp: the mean of exponentials is not below the exponential of the mean (Jensen).
    low = ranges.mean + log_count
    high = low + log_chord(ranges.mean, ranges.low, ranges.high)
    used = log_count + torch.zeros_like(low)
    if level.coarse.shape[1] > 0:
        used = used + used_logits(found, level, ranges)[level.row_of]
    low, high, used = (x.masked_fill(~coarse, -torch.inf) for x in (low, high, used))
    width = (ranges.high - ranges.low).masked_fill(~coarse, 0.0)
    return LevelMasses(level, ranges, MassBounds(low, high, used, width))


def used_logits(found: Planned, level: Level, ranges: Ranges) -> Tensor:
    """Return the logits that attention takes for the keys of a block, `(rows, nk)`."""
    if found.settings.sparse:
        return torch.full((level.coarse.shape[1:]), -torch.inf, dtype=torch.float64)
    logits = capped(of_rows(ranges.product, level), found.settings.softcap) + of_rows(ranges.bias, level)
    return logits + found.settings.coarse_shift


def coarse_of_queries(found: Planned, item: Item, head: int, level: Level) -> Tensor:
    """Return which blocks are coarse for each query, bool `(Lq, nk)`."""
    if level.coarse.numel() == 0:
        return torch.zeros(level.row_of.shape[0], level.coarse.shape[2], dtype=torch.bool)
    # A block that is not refined is seen by a query as a whole or not at all, so one of its keys says which.
    keys = torch.arange(level.block_of.shape[0])
    some = torch.zeros_like(level.keys, dtype=torch.int64)
    valid = level.block_of >= 0
    some = some.scatter(0, level.block_of[valid], keys[valid])
    return level.coarse[head][level.row_of] & visible_pairs(found, item, head, some)


def of_rows(x: Tensor, level: Level, kind: Literal["mean", "amax", "amin"] = "mean") -> Tensor:
    """Return the mean of every row's queries, or their largest or least, `(rows, nk)`; 0 in a row without one."""
    target = x.new_zeros(level.coarse.shape[1], x.shape[1])
    index = level.row_of[level.pooled][:, None].expand(-1, x.shape[1])
    return target.scatter_reduce_(0, index, x[level.pooled], kind, include_self=False)
