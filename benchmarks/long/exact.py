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
    return exact_and_entropy(query, key, value, rows, scale, causal=causal)[0]


def exact_and_entropy(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Return the exact output, and the mean entropy (H,) of the weights of these rows, in nats."""
    group = query.shape[1] // key.shape[1]
    places = torch.arange(key.shape[2])
    out: list[Tensor] = []
    entropies: list[Tensor] = []
    for head in range(query.shape[1]):
        k, v = (x[0, head // group].double() for x in (key, value))
        pieces: list[Tensor] = []
        entropy = torch.zeros((), dtype=torch.float64)
        for some in rows.split(ROWS_AT_ONCE):
            logits = scale * query[0, head, some].double() @ k.T
            if causal:
                logits.masked_fill_(places > some[:, None], -torch.inf)
            weights = logits.softmax(-1)
            pieces.append(weights @ v)
            entropy += torch.special.entr(weights).sum()
        out.append(torch.cat(pieces))
        entropies.append(entropy / len(rows))
    return torch.stack(out), torch.stack(entropies)


def error(out: Tensor, rows: Tensor, exact: Tensor) -> float:
    """Return the mean over heads of `errors`."""
    return errors(out, rows, exact).mean().item()


def errors(out: Tensor, rows: Tensor, exact: Tensor) -> Tensor:
    """Return ||out - exact|| / ||exact|| of each head (H,), over these rows of out (1, H, L, Dv).

    Raises
    ------
    AssertionError
        If a number of the rows is not finite.
    """
    found = out[0, :, rows].double()
    if not found.isfinite().all():
        raise AssertionError(f"an output of {tuple(out.shape)} is not finite")
    return (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
