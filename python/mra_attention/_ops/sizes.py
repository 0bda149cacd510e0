"""Sizes that may be known later only; and that of a plan.

It follows from shapes and settings alone, by one expression that does not branch on a length. So a compiler that does
not know the lengths makes one program for all of them. The native module computes the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .arguments import Settings

_MOST = 2**31
_HEADER = 8  # bytes


def is_one(size: Any) -> bool:
    """Return whether a size is 1, without asking for one that is known later, which would fix it."""
    return type(size) is int and size == 1


def _minimum(a: int, b: int) -> int:
    return min(a, b) if type(a) is int and type(b) is int else torch.sym_min(a, b)  # pyright: ignore[reportReturnType]


def _maximum(a: int, b: int) -> int:
    return max(a, b) if type(a) is int and type(b) is int else torch.sym_max(a, b)  # pyright: ignore[reportReturnType]


def blocks_per_token(rate: float) -> int:
    """Return how many blocks are exact for each token, by `blocks_per_row`."""
    return max(1, math.floor(min(rate, float(_MOST)) + 0.5))


def _places_per_token(settings: Settings) -> int:
    """Return the most blocks that a plan names for a token; 0 if it need not name them, since all are exact."""
    rates = settings.blocks_per_row
    if settings.num_blocks is not None:
        chosen = settings.num_blocks
    elif all(rate == math.inf for rate in rates):
        return 0
    else:
        chosen = max(blocks_per_token(rate) for rate in rates)
    diagonal = settings.diagonal_blocks // 2 + 1 if settings.diagonal_blocks > 0 else 1
    local = 2 * _maximum(settings.local_blocks, diagonal) - 1
    first = 1 if settings.first_blocks is None else settings.first_blocks
    return _maximum(chosen, local + first)


def plan_bytes(
    heads: int, query_length: int, key_length: int, settings: Settings, has_bias: bool, sequences: int | None = None
) -> int:
    """Return the bytes of a plan for each batch item; with `sequences`, of all packed sequences together."""
    block = settings.block_size
    if block < 1:
        raise ValueError(f"block_size must be at least 1, got {block}")
    key_blocks = (key_length + block - 1) // block
    token = 4 * heads * query_length * _minimum(key_blocks, _places_per_token(settings))
    if settings.window_left >= 0 or settings.window_right >= 0 or not settings.pool_queries:
        return _HEADER + token
    if sequences is None:
        # Padded queries in front of the first valid one may need one more row of blocks.
        rows, row_bytes = (query_length + block - 1) // block + 1, (key_blocks + 7) // 8
    else:
        rows, row_bytes = query_length // block + 2 * sequences, key_length // (8 * block) + 2
    bits = heads * rows * row_bytes
    return _HEADER + bits + token if has_bias else _HEADER + bits
