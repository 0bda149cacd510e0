"""Which blocks are exact: docs/definitions.md, sections 3.1 to 3.5 and 4.1 to 4.4, one head and one row at a time."""

from __future__ import annotations

import math

import torch
from oracle_geometry import Geometry, Settings
from torch import Tensor


def select_block_form(pooled: Tensor, g: Geometry, settings: Settings) -> Tensor:
    """(H, rows, nk) bool from the logits of pooled queries and pooled keys, (H, rows, nk)."""
    selected = torch.zeros(pooled.shape, dtype=torch.bool)
    for head, rate in enumerate(settings.rates(pooled.shape[0])):
        number = settings.num_blocks
        if number is None:
            wanted = rate * g.query_blocks
            number = math.floor(wanted + 0.5) if math.isfinite(wanted) else pooled[0].numel()
        selected[head] = _select_head(pooled[head], g, number, settings)
    return selected


def _select_head(pooled: Tensor, g: Geometry, num_blocks: int, settings: Settings) -> Tensor:
    rows, nk = pooled.shape
    first_blocks = settings.first_blocks or 0
    columns = [j for j in range(nk) if g.count[j] > 0]
    score: dict[tuple[int, int], float] = {}
    forced: set[tuple[int, int]] = set()
    beyond: list[tuple[int, int]] = []
    for row in range(rows) if columns else []:
        if not g.pooled[row].any():
            continue
        logits = pooled[row].tolist()
        best = max(columns, key=lambda j: (logits[j], -j))
        if not g.live_rows[row]:
            beyond.append((row, best))
            continue
        score |= {(row, j): logits[j] - logits[best] for j in columns}
        i = row + g.first_row
        near = [j for j in columns if settings.diagonal_blocks > 0 and abs(i - j) <= settings.diagonal_blocks // 2]
        near += [j for j in columns if settings.local_blocks > 1 and abs(i - j) < settings.local_blocks]
        first = [j for j in columns if i < first_blocks or j < first_blocks]
        forced |= {(row, j) for j in [best, *near, *first]}
    optional = sorted((block for block in score if block not in forced), key=lambda b: (-score[b], b[0] * nk + b[1]))
    chosen = forced | set(optional[: max(0, num_blocks - len(forced))])
    if len(chosen) == len(score):
        beyond = [(row, j) for row, _ in beyond for j in columns]
    selected = torch.zeros(rows, nk, dtype=torch.bool)
    for at in [*chosen, *beyond]:
        selected[at] = True
    return selected


def select_token_form(logits: Tensor, g: Geometry, settings: Settings) -> Tensor:
    """(H, Lq, nk) bool from the logits of each token and the pooled keys, (H, Lq, nk)."""
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
            not_dead = [j for j in range(nk) if is_open[j] or is_cut[j]]
            own = int(g.own_block[t])
            exact = {j for j in not_dead if is_cut[j] or abs(own - j) < local_blocks}
            exact |= set(not_dead[:first_blocks])
            score = logits[head, t].tolist()
            others = sorted((j for j in not_dead if j not in exact), key=lambda j: (math.isnan(score[j]), -score[j], j))
            exact |= set(others[: max(0, number - len(exact))])
            selected[head, t, list(exact)] = True
    return selected
