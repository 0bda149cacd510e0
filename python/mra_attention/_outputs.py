"""Fresh tensors for the results of the operators, allocated alike by the CPU kernels and by the fake kernels."""

from __future__ import annotations

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
