"""Exact attention of some queries, without L * L numbers, and the error beside it."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 256
"""Queries of each head for which the exact output is computed."""

ROWS_AT_ONCE = 32


def sample(length: int) -> Tensor:
    """Return the places of queries, the same ones in each call."""
    chosen = torch.randperm(length, generator=torch.Generator().manual_seed(1))[:ROWS]
    return chosen.sort().values


def exact_rows(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, scale: float, *, causal: bool) -> Tensor:
    """Return the exact output (H, rows, Dv) in float64 for query (1, H, L, D), key and value (1, Hk, L, D)."""
    group = query.shape[1] // key.shape[1]
    places = torch.arange(key.shape[2])
    out: list[Tensor] = []
    for head in range(query.shape[1]):
        k, v = (x[0, head // group].double() for x in (key, value))
        pieces: list[Tensor] = []
        for some in rows.split(ROWS_AT_ONCE):
            logits = scale * query[0, head, some].double() @ k.T
            if causal:
                logits.masked_fill_(places > some[:, None], -torch.inf)
            pieces.append(logits.softmax(-1) @ v)
        out.append(torch.cat(pieces))
    return torch.stack(out)


def error(out: Tensor, rows: Tensor, exact: Tensor) -> float:
    """Return the mean over heads of ||out - exact|| / ||exact|| over these rows of out (1, H, L, Dv).

    Raises
    ------
    AssertionError
        If a number of the rows is not finite.
    """
    found = out[0, :, rows].double()
    if not found.isfinite().all():
        raise AssertionError(f"an output of {tuple(out.shape)} is not finite")
    away = (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    return away.mean().item()
