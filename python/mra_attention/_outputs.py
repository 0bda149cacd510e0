"""Fresh tensors for the results of the operators, allocated alike by the CPU kernels and by the fake kernels."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor


def _empty(like: Tensor, length: int, head_dim: int) -> Tensor:
    """Allocate `(B, H, length, head_dim)`, with the heads inside the positions in memory where `like` has them so.

    A model that stores `(B, L, H, D)` then gets an output that it can flatten without a copy. Strides are given rather
    than a transpose taken: autograd forbids in-place changes of a view that was made inside a custom function.
    """
    if like.shape[2] == length and like.shape[3] == head_dim and like.is_contiguous():
        return torch.empty_like(like)  # the same, faster
    batch, heads = like.shape[:2]
    _, head_stride, position_stride, _ = like.stride()
    if head_stride < position_stride:
        strides = (length * heads * head_dim, head_dim, heads * head_dim, 1)
    else:
        strides = (heads * length * head_dim, length * head_dim, head_dim, 1)
    return torch.empty_strided((batch, heads, length, head_dim), strides, dtype=like.dtype, device=like.device)


def empty_plan(query: Tensor, key: Tensor, block_size: int) -> Tensor:
    """Allocate the bits of a plan: one byte for eight key blocks."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    batch, heads, query_length, _ = query.shape
    rows = (query_length + block_size - 1) // block_size
    columns = (key.shape[2] + block_size - 1) // block_size
    return torch.empty((batch, heads, rows, (columns + 7) // 8), dtype=torch.uint8, device=query.device)


def empty_out(query: Tensor, value_dim: int) -> Tensor:
    """Allocate the output."""
    return _empty(query, query.shape[2], value_dim)


def empty_like_query(query: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """Allocate the output and the log-sum-exp."""
    lse_dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    return empty_out(query, value_dim), torch.empty(query.shape[:3], dtype=lse_dtype, device=query.device)


def empty_outputs(query: Tensor, key: Tensor, value: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the output, the log-sum-exp and the plan."""
    return (*empty_like_query(query, value.shape[3]), empty_plan(query, key, block_size))


def empty_grads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the gradients of query, key and value."""
    return (
        _empty(query, query.shape[2], query.shape[3]),
        _empty(key, key.shape[2], key.shape[3]),
        _empty(value, value.shape[2], value.shape[3]),
    )


def budget_of_a_token(blocks_per_row: float) -> int:
    """Return how many blocks are exact for each token of causal attention."""
    return max(1, math.floor(min(blocks_per_row, 2.0**31) + 0.5))


def causal_plan_width(key_length: int, block_size: int, blocks: int, local_blocks: int, first_blocks: int) -> int:
    """Return how many blocks a causal plan has room for, for each token."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    columns, wanted = (key_length + block_size - 1) // block_size, max(blocks, local_blocks + first_blocks)
    if not isinstance(columns, torch.SymInt):
        return min(columns, wanted)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import, and loaded by now

    # A length that is known later: to ask which one is smaller would fix the answer for this graph, and to write down
    # that it is the smaller one makes a size that torch.export cannot reason about.
    return wanted if statically_known_true(columns >= wanted) else cast("int", torch.sym_min(columns, wanted))


def empty_causal_outputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Tensor | None,
    block_size: int,
    blocks: int,
    local_blocks: int,
    first_blocks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the output, the log-sum-exp and the plan, which is as wide as the given one."""
    if plan is None:
        width = causal_plan_width(key.shape[2], block_size, blocks, local_blocks, first_blocks)
    else:
        width = plan.shape[-1]
    plan_out = torch.empty((*query.shape[:3], width), dtype=torch.int32, device=query.device)
    return (*empty_like_query(query, value.shape[3]), plan_out)


def empty_packed_outputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: int,
    block_size: int,
    causal: bool,
    blocks_per_row: float,
    local_blocks: int,
    first_blocks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the output, the log-sum-exp and the plans of packed sequences, one plan after the other.

    There is room for the plans of sequences of any lengths with these totals, of which `sequences` is the number. What
    is not needed is neither written nor read, so it costs addresses but no memory.
    """
    total, heads, _ = query.shape
    total_keys, _, value_dim = value.shape
    lse_dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    if causal:
        blocks = budget_of_a_token(blocks_per_row)
        width = causal_plan_width(total_keys, block_size, blocks, local_blocks, first_blocks)
        plans = torch.empty(total * heads * width, dtype=torch.int32, device=query.device)
    else:
        rows, row_bytes = total // block_size + sequences, total_keys // (8 * block_size) + 1
        plans = torch.empty(heads * rows * row_bytes, dtype=torch.uint8, device=query.device)
    out = torch.empty((total, heads, value_dim), dtype=query.dtype, device=query.device)
    lse = torch.empty((heads, total), dtype=lse_dtype, device=query.device)
    return out, lse, plans


def empty_packed_grads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the gradients of packed query, key and value."""
    return (
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        torch.empty(key.shape, dtype=key.dtype, device=key.device),
        torch.empty(value.shape, dtype=value.dtype, device=value.device),
    )
