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
_CUT_BY_WINDOW = 2  # blocks of a token, at most


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


def _local_reach(settings: Settings) -> int:
    """Return how far from its own a token's exact blocks reach in any case, in blocks, less one."""
    diagonal = settings.diagonal_blocks // 2 + 1 if settings.diagonal_blocks > 0 else 1
    return _maximum(settings.local_blocks, diagonal) - 1


def _places_per_token(settings: Settings, rates: list[float], ratio: int) -> int:
    """Return the most blocks that a plan names for a token at a level whose blocks have `ratio` finest ones each."""
    chosen = max(blocks_per_token(rate) for rate in rates) if settings.num_blocks is None else settings.num_blocks
    local = (2 * _local_reach(settings) + ratio - 1) // ratio + 1
    first = 1 if settings.first_blocks is None else settings.first_blocks
    return _maximum(chosen, local + first)


def _named_per_token(settings: Settings, has_bias: bool) -> list[int]:
    """Return the most blocks that the plan of each level names for a token, of however many keys."""
    named: list[int] = []
    size_above = 0
    for size, rates in zip(settings.block_sizes, settings.rates(), strict=True):
        most = _places_per_token(settings, rates, size // settings.block_size)
        if named and not has_bias:
            # Children of blocks that the level above names or that a window cuts; a mask may cut any number.
            most = _minimum(most, (named[-1] + _CUT_BY_WINDOW) * (size_above // size))
        named.append(most)
        size_above = size
    return named


def _capacity(settings: Settings, rates: list[float], ratio: int, rows: int, columns: int) -> int:
    """Return the most blocks of a head that a level of the block form refines."""
    first = ((settings.first_blocks or 0) + ratio - 1) // ratio
    reaches: list[int] = []
    if settings.diagonal_blocks > 0:
        reaches.append(settings.diagonal_blocks // 2)
    if settings.local_blocks > 1:
        reaches.append(settings.local_blocks - 1)
    diagonal = 2 * ((max(reaches) + ratio - 1) // ratio) + 1 if reaches else 0
    chosen = math.ceil(min(max(rates), float(_MOST))) * rows
    return _minimum(chosen + rows * (diagonal + 2) + first * (rows + columns), rows * columns)


def plan_bytes(
    heads: int, query_length: int, key_length: int, settings: Settings, has_bias: bool, sequences: int | None = None
) -> int:
    """Return the bytes of a plan for each batch item; with `sequences`, of all packed sequences together."""
    everything = settings.num_blocks is None and all(rate == math.inf for rate in settings.blocks_per_row)
    total: int = _HEADER
    refined, size_above = 0, 0
    if min(settings.block_sizes) < 1:
        raise ValueError(f"block sizes must be at least 1, got {settings.block_sizes}")
    named = _named_per_token(settings, has_bias)
    for size, rates, of_token in zip(settings.block_sizes, settings.rates(), named, strict=True):
        ratio = size // settings.block_size
        key_blocks = (key_length + size - 1) // size
        places = 0 if everything else _minimum(key_blocks, of_token)
        token = 4 * heads * query_length * places
        if settings.is_token_form():
            total += token
            continue
        if sequences is None:
            # Padded queries in front of the first valid one may need one more row of blocks.
            rows, columns, row_bytes = (query_length + size - 1) // size + 1, key_blocks, (key_blocks + 7) // 8
        else:
            rows, columns = query_length // size + 2 * sequences, key_length // size + 2 * sequences
            row_bytes = key_length // (8 * size) + 2
        capacity = _capacity(settings, rates, ratio, rows, columns)
        if size_above > 0:
            # Below the coarsest level blocks are chosen among the children of those that the level above refines.
            children = size_above // size
            bits = heads * refined * children * ((children + 7) // 8)
            capacity = _minimum(capacity, refined * children**2)
        else:
            bits = heads * rows * row_bytes
        refined, size_above = capacity, size
        total += bits + token if has_bias else bits
    return total
