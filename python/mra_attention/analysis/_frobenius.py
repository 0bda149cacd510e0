"""The paper's bound of the unnormalised matrix, for one head."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._planned import Item, Planned, visible_pairs
from ._ranges import chunks_of_logits
from .masses import LevelMasses, of_rows, used_logits


def log_paper_constant(width: Tensor) -> Tensor:
    """Return `log C(2 r)` of the paper, `C(2 r) = (exp(r) - 1)^2`, for logits that are `r` apart at most."""
    return 2.0 * (width + torch.log(-torch.expm1(-width)))


def log_sharp_constant(width: Tensor) -> Tensor:
    """Return `log (S - 1)`, S Specht's ratio of `exp(2 r)`: the least constant for all logits that are so far apart."""
    x = 2.0 * width
    safe = x.clamp(min=1e-3)
    log_ratio = safe + torch.log(-torch.expm1(-safe)) + safe / torch.expm1(safe) - 1.0 - safe.log()
    exact = log_ratio + torch.log(-torch.expm1(-log_ratio))
    # Near 0 the terms cancel; log S is x^2 / 8 - x^4 / 576 + ..., never above x^2 / 8.
    return torch.where(x < 1e-3, torch.log(torch.expm1(x * x / 8.0)), exact)


class LogErrors(NamedTuple):
    """Logarithms of bounds of `||approximation - A||_F^2` over the valid queries of a head."""

    paper: Tensor
    sharp: Tensor
    uniform: Tensor
    """As the paper states it: the largest range and the largest coefficient for all blocks."""


def log_errors(found: Planned, queries: Tensor, head: list[LevelMasses]) -> LogErrors:
    """Sum the bounds of all coarse blocks of a head; `queries`, bool `(Lq,)`, are the valid ones.

    In a block whose pairs have logits of mean m, r apart at most, and of which u is taken for each exponential, the sum
    of `(exp(P) - u)^2` is at most `pairs exp(2 m) (C(2 r) + (1 - u / exp(m))^2)`. With the means `u = exp(m)`.
    """
    parts: list[tuple[Tensor, ...]] = []
    for level, ranges, bounds in head:
        in_row = torch.zeros(level.coarse.shape[1], dtype=torch.float64)
        in_row.index_add_(0, level.row_of[queries], torch.ones(int(queries.sum()), dtype=torch.float64))
        coarse = of_rows((bounds.low > -math.inf).double(), level, "amax") * in_row[:, None] > 0
        mean = of_rows(ranges.mean, level)
        width = of_rows(ranges.high, level, "amax") - of_rows(ranges.low, level, "amin")
        ratio = (used_logits(found, level, ranges) - mean).exp()  # 1 but for a shift, a softcap, the sparse mode
        pairs = (in_row[:, None] * level.keys).log()
        parts.append(tuple(x[coarse] for x in (pairs, mean, width, 2.0 * (1.0 - ratio).abs().log())))
    pairs, mean, width, off = (torch.cat(x) for x in zip(*parts, strict=True))
    if mean.numel() == 0:
        return LogErrors(*(torch.full((), -math.inf, dtype=torch.float64),) * 3)
    paper, sharp = (torch.logaddexp(log(width), off) for log in (log_paper_constant, log_sharp_constant))
    uniform = pairs.logsumexp(0) + 2.0 * mean.amax() + torch.logaddexp(log_paper_constant(width.amax()), off.amax())
    return LogErrors((pairs + 2.0 * mean + paper).logsumexp(0), (pairs + 2.0 * mean + sharp).logsumexp(0), uniform)


def log_squares(found: Planned, item: Item, head: int, log_total: Tensor | None) -> Tensor:
    """Return `log ||A||_F^2` over the valid queries of a head.

    With `log_total`, `(Lq,)`, that the sums of rows are not below, a lower bound: `(sum_s x_s)^2 <= n sum_s x_s^2`.
    """
    queries = item.tokens.queries
    if log_total is not None:
        return (2.0 * log_total[queries] - math.log(max(1, int(item.tokens.keys.sum())))).logsumexp(0)
    seen = visible_pairs(found, item, head)
    rows: list[Tensor] = []
    for at, logits, _ in chunks_of_logits(found, item, head):
        hidden = ~seen[at : at + logits.shape[0]]
        rows.append((2.0 * logits).masked_fill(hidden, -math.inf).logsumexp(-1))
    return torch.cat(rows)[queries].logsumexp(0)
