"""A bound of the error of an approximation, from its plan and before any exact attention."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._checks import calls
from .._plan import Plan
from ._frobenius import log_errors, log_squares
from ._planned import Item, Planned, item_of, planned
from ._ranges import block_means, norms, radii
from .attention_call import AttentionCall
from .masses import LevelMasses, checked_ranges, masses

_ROUNDING = 8 * torch.finfo(torch.float64).eps
_NO_GAIN = 1e-12
_STEPS = 100
"""Dinkelbach's method ends after a few steps; this is for ties that rounding keeps open."""


class ErrorBound(NamedTuple):
    """Bounds of the error of attention with a plan, in float64; a query without a key has no error."""

    paper: Tensor
    """`(B, H)`: of `||Ahat - A||_F / ||A||_F`, A the exponentials of the logits of the valid queries; the paper's bound
    block by block, with its constant."""
    sharp: Tensor
    """`(B, H)`: likewise, with the least constant."""
    uniform: Tensor
    """`(B, H)`: likewise, as the paper states it: every block as bad as the worst one."""
    lse_low: Tensor
    """`(B, H, Lq)`: the exact lse less that of the approximation is not below this."""
    lse_high: Tensor
    """`(B, H, Lq)`: and not above this."""
    output: Tensor
    """`(B, H, Lq)`: of `|out - exact|`, the Euclidean norm."""
    relative: Tensor
    """`(B, H)`: of `||out - exact||_F / ||exact||_F` over the valid queries; infinite where the bound says nothing."""


def error_bound(call: AttentionCall, plan: Plan, *, ranges: Literal["keys", "norms"] = "norms") -> ErrorBound:
    """Bound the error that attention with a plan makes.

    Parameters
    ----------
    call : AttentionCall
        What attention was given, with all queries.
    plan : Plan
        Of `mra_attention.plan` for the same tensors and masks; its `mode` and `coarse_shift` are those of attention.
    ranges : {"keys", "norms"}, default "norms"
        How far logits are apart within a block: from each of them, which takes the time of exact attention, or at most
        `2 scale |q| max |k - mean|`, which takes products with means alone.

    Returns
    -------
    ErrorBound
        Bounds by batch item, head and query.

    Raises
    ------
    TypeError
        If `plan` is no plan.
    ValueError
        If the plan is of other inputs, the call has only some of its queries, or an argument has a value that is not
        accepted.
    NotImplementedError
        With `coarse="first_order"`, a `query_padding_mask`, and a softcap beside `ranges="norms"`.

    Notes
    -----
    Definition and proofs: docs/analysis.md, "Errors known before they are paid"; arXiv 2207.10284, section 4, for the
    bound of the matrix. The bounds hold for the given numbers in exact arithmetic; they are computed in float64, so to
    about 1e-12 of the largest logit. What kernels of a dtype round comes on top. Deterministic. Memory: some tensors of
    `Lq` times the number of blocks for one head at a time.

    Examples
    --------
    >>> import torch
    >>> import mra_attention
    >>> from mra_attention.analysis import AttentionCall, error_bound
    >>> _ = torch.manual_seed(0)
    >>> call = AttentionCall(*torch.randn(3, 1, 2, 256, 16).unbind())
    >>> error_bound(call, mra_attention.plan(call.query, call.key)).output.shape
    torch.Size([1, 2, 256])
    """
    found = planned(call, plan)
    by_norms = checked_ranges(found, ranges)
    batch, heads, length = call.query.shape[:3]
    of_heads = torch.zeros(4, batch, heads, dtype=torch.float64)
    of_queries = torch.zeros(3, batch, heads, length, dtype=torch.float64)
    for index in range(batch):
        item = item_of(found, index)
        for head in range(heads):
            of_heads[:, index, head], of_queries[:, index, head] = _of_head(found, item, head, by_norms)
    paper, sharp, uniform, relative = of_heads
    lse_low, lse_high, output = (calls.finish(x, found.prepared) for x in of_queries)
    return ErrorBound(paper, sharp, uniform, lse_low, lse_high, output, relative)


def _of_head(found: Planned, item: Item, head: int, by_norms: bool) -> tuple[Tensor, Tensor]:
    """Return the numbers of a head, in the order of the fields, and those of its queries, `(3, Lq)`."""
    levels = [masses(found, item, head, level, by_norms) for level in item.levels]
    low, high, used = (torch.cat(x, -1) for x in zip(*(of_level.bounds[:3] for of_level in levels), strict=True))
    exact = found.sparse_lse[item.number, head]
    sink = -math.inf if found.inputs.sinks is None else float(found.inputs.sinks[item.number, head])
    sinks = torch.full_like(exact, sink)
    seen = torch.cat((exact[:, None], low), -1).amax(-1) > -math.inf
    fixed = torch.where(seen, torch.logaddexp(exact, sinks), -math.inf)
    lse, lse_low, lse_high = (torch.cat((fixed[:, None], x), -1).logsumexp(-1) for x in (used, low, high))
    out, output = _outputs(found, item, head, levels, (exact, fixed), (low, high, used), lse)
    out = torch.where(seen[:, None], out, 0.0)
    of_queries = torch.stack((lse_low - lse, lse_high - lse, output)).masked_fill(~seen, 0.0)

    valid = item.tokens.queries & seen
    if not valid.any():
        return torch.zeros(4, dtype=torch.float64), of_queries
    total = torch.cat((exact[:, None], low), -1).logsumexp(-1) if by_norms else None
    squares = log_squares(found, item, head, total)
    frobenius = [(0.5 * (error - squares)).exp() for error in log_errors(found, item.tokens.queries, levels)]
    error, size = (norms(x[valid].flatten()) for x in (of_queries[2], out))
    relative = torch.where(error < size, error / (size - error), math.inf).where(error > 0, 0.0)
    return torch.stack((*frobenius, relative)), of_queries


def _outputs(
    found: Planned,
    item: Item,
    head: int,
    levels: list[LevelMasses],
    fixed: tuple[Tensor, Tensor],
    logs: tuple[Tensor, Tensor, Tensor],
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the output, `(Lq, Dv)`, and the bound of its error, `(Lq,)`.

    With the exact mass E and its output o, the mass F of E and the sink, and, of the coarse blocks j, the masses M and
    the mean values v as they are, U and vh as they are taken: `(F + sum M) (exact - out)` is
    `sum M (v - vh) + (M - U) (vh - out)`, and also `E (o - out) - (F - E) out + sum M (v - out)`.
    """
    value = item.value[head // (item.query.shape[0] // item.value.shape[0])]
    means = [block_means(value, of_level.level) for of_level in levels]
    all_means = torch.cat(means)
    alone = found.sparse_out[item.number, head]
    lse = lse.masked_fill(lse == -math.inf, 0.0)  # the sparse mode may take nothing
    out = (fixed[0] - lse).exp()[:, None] * alone + (logs[2] - lse[:, None]).exp() @ all_means
    # Weights that are within a factor exp(width) of equal ones move at most tanh(width / 4) of their sum.
    within = torch.cat(
        [
            radii(value, mean, of_level.level) * (2.0 * (of_level.bounds.width / 4).tanh()).clamp(max=1.0)
            for mean, of_level in zip(means, levels, strict=True)
        ],
        -1,
    )
    away = torch.cdist(out, all_means, compute_mode="donot_use_mm_for_euclid_dist")
    # What rounding may hide of a distance counts where far too much was taken for a block.
    away = away + _ROUNDING * (norms(out)[:, None] + norms(all_means))
    exact, rest, low, high, used = _scaled(*fixed, *logs)
    by_difference = largest_error((torch.zeros_like(rest), rest), (low, high, used), within, away)
    # Where far too much was taken for a block, the terms of the second sum cancel, and those of the third do not.
    of_rest = exact * norms(alone - out)[:, None] + (rest - exact).clamp(min=0.0) * norms(out)[:, None]
    masses = low, high, torch.zeros_like(used)
    return out, by_difference.minimum(largest_error((of_rest, rest), masses, within, away))


def _scaled(exact: Tensor, rest: Tensor, low: Tensor, high: Tensor, used: Tensor) -> tuple[Tensor, ...]:
    """Return masses from their logarithms, divided by the least total of their query; the first two as columns.

    A mass that is larger by a factor of exp(600) is as good as infinite: the bound has its limit.
    """
    total = torch.cat((rest[:, None], low), -1).logsumexp(-1, keepdim=True)
    total = total.masked_fill(total == -math.inf, 0.0)
    return tuple((x - total).clamp(max=600.0).exp() for x in (exact[:, None], rest[:, None], low, high, used))


def largest_error(
    rest: tuple[Tensor, Tensor], masses: tuple[Tensor, Tensor, Tensor], within: Tensor, away: Tensor
) -> Tensor:
    """Return the largest `(error + sum M within + |M - used| away) / (mass + sum M)` over all M between low and high.

    `rest` are error and mass, `(Lq, 1)`; `masses` low, high and used. The numerator is convex in each M, so the largest
    is at corners; Dinkelbach's method finds it.
    """
    low, high, used = masses
    at_low, at_high = ((used - x).abs() * away + x * within for x in (low, high))
    found, chosen = torch.zeros_like(rest[1]), torch.ones_like(low, dtype=torch.bool)
    for _ in range(_STEPS):
        error = rest[0] + torch.where(chosen, at_high, at_low).sum(-1, keepdim=True)
        mass = rest[1] + torch.where(chosen, high, low).sum(-1, keepdim=True)
        ratio = torch.where(error > 0, error / mass, 0.0)
        if not (ratio > found).any():
            break
        found = torch.maximum(found, ratio)
        # What gains no more than rounding is left out: beside a huge mass of that kind nothing else would count.
        chosen = at_high - at_low - found * (high - low) > _NO_GAIN * (at_high + found * high)
    return found[:, 0] * (1.0 + 2.0 * _NO_GAIN)
