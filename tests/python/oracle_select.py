"""Which blocks are exact, or refined: docs/definitions.md, sections 3.1 to 3.5, 4.1 to 4.4 and 5, row by row.

`candidates`, (H, rows, nk), are the blocks among which a level chooses: all, or the children of those that the level
above refines. A block has `ratio` of the finest blocks side by side, and those say what is forced.
"""

from __future__ import annotations

import math
import sys

import torch
from oracle_geometry import Geometry, Settings
from torch import Tensor

CANDIDATES = 4
LOWEST = -sys.float_info.max


def select_block_form(pooled: Tensor, g: Geometry, settings: Settings, candidates: Tensor, ratio: int) -> Tensor:
    """(H, rows, nk) bool from the logits of pooled queries and pooled keys, (H, rows, nk)."""
    selected, nk = torch.zeros(pooled.shape, dtype=torch.bool), pooled.shape[-1]
    for head, rate in enumerate(settings.rates(pooled.shape[0])):
        number = settings.num_blocks
        if number is None:
            wanted = rate * g.query_blocks
            number = math.floor(wanted + 0.5) if math.isfinite(wanted) else pooled[0].numel()
        # Above the finest level padded rows take all only if the budget itself grants all blocks of a row.
        every = ratio == 1 or math.ceil(min(rate, nk)) >= int((g.count > 0).sum())
        selected[head] = _select_head(pooled[head], g, number, settings, candidates[head], ratio, every)
    return selected


def _is_forced(i: int, j: int, settings: Settings, ratio: int) -> bool:
    """Whether one of the finest blocks in block (i, j) is."""
    first_blocks = settings.first_blocks or 0
    for a in range(i * ratio, (i + 1) * ratio):
        for b in range(j * ratio, (j + 1) * ratio):
            near = settings.diagonal_blocks > 0 and abs(a - b) <= settings.diagonal_blocks // 2
            local = settings.local_blocks > 1 and abs(a - b) < settings.local_blocks
            if near or local or a < first_blocks or b < first_blocks:
                return True
    return False


def _select_head(
    pooled: Tensor, g: Geometry, num_blocks: int, settings: Settings, candidates: Tensor, ratio: int, every: bool
) -> Tensor:
    rows, nk = pooled.shape
    score: dict[tuple[int, int], float] = {}
    forced: set[tuple[int, int]] = set()
    beyond: list[tuple[int, int]] = []
    of_row = [[j for j in range(nk) if g.count[j] > 0 and candidates[row, j]] for row in range(rows)]
    for row, columns in enumerate(of_row):
        if not columns or not g.pooled[row].any():
            continue
        logits = pooled[row].tolist()
        best = max(columns, key=lambda j: (logits[j], -j))
        if not g.live_rows[row]:
            beyond.append((row, best))
            continue
        score |= {(row, j): logits[j] - logits[best] for j in columns}
        forced.add((row, best))
        forced |= {(row, j) for j in columns if _is_forced(row + g.first_row, j, settings, ratio)}
    optional = sorted((block for block in score if block not in forced), key=lambda b: (-score[b], b[0] * nk + b[1]))
    chosen = forced | set(optional[: max(0, num_blocks - len(forced))])
    if every and (len(chosen) if ratio == 1 else min(num_blocks, len(score))) == len(score):
        beyond = [(row, j) for row, _ in beyond for j in of_row[row]]
    selected = torch.zeros(rows, nk, dtype=torch.bool)
    for at in [*chosen, *beyond]:
        selected[at] = True
    return selected


def candidate_bound(logits: list[float], wanted: int) -> float:
    """What the logits of candidates reach, section 4.1."""

    def count(bound: float) -> int:
        return sum(logit >= bound for logit in logits)

    top = max((logit for logit in logits if logit > -math.inf), default=LOWEST)
    low, high, step = top, math.inf, 4.0
    while count(low) < wanted and low > LOWEST:
        low, high, step = max(LOWEST, min(top, -LOWEST) - step), low, 2 * step
    while count(low) > wanted + wanted // 8:
        middle = 0.5 * low + 0.5 * high
        if not low < middle < high:
            break
        low, high = (middle, high) if count(middle) >= wanted else (low, middle)
    return low


def select_token_form(
    logits: Tensor,
    g: Geometry,
    settings: Settings,
    candidates: Tensor,
    ratio: int,
    finest: Geometry,
    max_scores: Tensor | None = None,
) -> Tensor:
    """(H, Lq, nk) bool from the logits of each token and the pooled keys, (H, Lq, nk), and better scores of some."""
    heads, queries, nk = logits.shape
    selected = torch.zeros(logits.shape, dtype=torch.bool)
    first_blocks = 1 if settings.first_blocks is None else settings.first_blocks
    local_blocks = settings.local_blocks
    if settings.diagonal_blocks > 0:
        local_blocks = max(local_blocks, settings.diagonal_blocks // 2 + 1)
    for head, rate in enumerate(settings.rates(heads)):
        if settings.num_blocks is not None:
            rate = settings.num_blocks / max(1, g.query_blocks)
        number = max(1, math.floor(rate + 0.5)) if math.isfinite(rate) else nk
        for t in range(queries):
            is_open, is_cut = g.is_open[head, t].tolist(), g.is_cut[head, t].tolist()
            not_dead = [j for j in range(nk) if (is_open[j] or is_cut[j]) and candidates[head, t, j]]
            own = int(finest.own_block[t])
            forced = set(range(own - local_blocks + 1, own + local_blocks))
            seen = (finest.is_open[head, t] | finest.is_cut[head, t]).nonzero().flatten().tolist()
            forced |= set(seen[:first_blocks])
            exact = {j for j in not_dead if is_cut[j] or not forced.isdisjoint(range(j * ratio, (j + 1) * ratio))}
            score = logits[head, t].tolist()
            free, take = [j for j in not_dead if j not in exact], max(0, number - len(exact))
            if max_scores is not None and 0 < take < len(free):
                bound = candidate_bound([score[j] for j in free], CANDIDATES * take)
                ranked = {j for j in free if score[j] >= bound}
                score = [x if j in ranked else -math.inf for j, x in enumerate(max_scores[head, t].tolist())]
            exact |= set(sorted(free, key=lambda j: (math.isnan(score[j]), -score[j], j))[:take])
            selected[head, t, list(exact)] = True
    return selected
