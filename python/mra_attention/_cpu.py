"""The CPU kernels of the operators: torch tensors in, pointers to the native module, torch tensors out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _core  # pyright: ignore[reportPrivateUsage]
from ._descriptors import Descriptor, describe, describe_optional, rows, seed_number
from ._outputs import empty_grads, empty_out, empty_outputs, empty_plan


def _describe_bias(bias: Tensor | None, query: Tensor, key: Tensor) -> Descriptor | None:
    """Describe a mask or bias that broadcasts to `(B, H, Lq, Lk)`, repeated by strides of 0."""
    if bias is None:
        return None
    return describe(bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2]))


def select_blocks(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    attn_bias: Tensor | None,
    scale: float,
    block_size: int,
    blocks_per_row: float,
    num_blocks: int | None,
    first_blocks: int,
    diagonal_blocks: int,
) -> Tensor:
    """Return the plan of the inputs."""
    query, key = rows(query), rows(key)
    key_mask = None if key_mask is None else rows(key_mask)
    query_mask = None if query_mask is None else rows(query_mask)
    plan = empty_plan(query, key, block_size)
    _core.select_blocks(
        describe(query),
        describe(key),
        describe_optional(key_mask),
        describe_optional(query_mask),
        _describe_bias(attn_bias, query, key),
        describe(plan),
        scale=scale,
        block_size=block_size,
        blocks_per_row=blocks_per_row,
        num_blocks=num_blocks,
        first_blocks=first_blocks,
        diagonal_blocks=diagonal_blocks,
        threads=torch.get_num_threads(),
    )
    return plan


def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the log-sum-exp and the plan: the given one, copied, or a new one."""
    out, lse, plan_out = empty_outputs(query, key, value, args[_BLOCK_SIZE])
    _forward_into(out, describe(lse), describe(plan_out), query, key, value, *args)
    return out, lse, plan_out


def forward_out(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Tensor:
    """Return the output alone. The arguments are those of `forward`."""
    out = empty_out(query, value.shape[3])
    _forward_into(out, None, None, query, key, value, *args)
    return out


_BLOCK_SIZE = 6  # its place behind query, key and value


def _forward_into(
    out: Tensor,
    lse: Descriptor | None,
    plan_out: Descriptor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    attn_bias: Tensor | None,
    plan: Tensor | None,
    seed: Tensor | None,
    scale: float,
    block_size: int,
    sparse: bool,
    dropout_p: float,
    blocks_per_row: float,
    num_blocks: int | None,
    first_blocks: int,
    diagonal_blocks: int,
) -> None:
    query, key, value = rows(query), rows(key), rows(value)
    key_mask = None if key_mask is None else rows(key_mask)
    query_mask = None if query_mask is None else rows(query_mask)
    plan = None if plan is None else plan.contiguous()
    _core.forward(
        describe(query),
        describe(key),
        describe(value),
        describe_optional(key_mask),
        describe_optional(query_mask),
        _describe_bias(attn_bias, query, key),
        describe_optional(plan),
        plan_out,
        describe(out),
        lse,
        scale=scale,
        block_size=block_size,
        sparse=sparse,
        dropout_p=dropout_p,
        seed=seed_number(seed),
        blocks_per_row=blocks_per_row,
        num_blocks=num_blocks,
        first_blocks=first_blocks,
        diagonal_blocks=diagonal_blocks,
        threads=torch.get_num_threads(),
    )


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    attn_bias: Tensor | None,
    plan: Tensor,
    seed: Tensor | None,
    scale: float,
    block_size: int,
    sparse: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    grads = empty_grads(query, key, value)
    grad_out, query, key, value, out = rows(grad_out), rows(query), rows(key), rows(value), rows(out)
    lse, plan = lse.contiguous(), plan.contiguous()
    key_mask = None if key_mask is None else rows(key_mask)
    query_mask = None if query_mask is None else rows(query_mask)
    _core.backward(
        describe(grad_out),
        describe_optional(grad_lse),
        describe(query),
        describe(key),
        describe(value),
        describe(out),
        describe(lse),
        describe_optional(key_mask),
        describe_optional(query_mask),
        _describe_bias(attn_bias, query, key),
        describe(plan),
        describe(grads[0]),
        describe(grads[1]),
        describe(grads[2]),
        scale=scale,
        block_size=block_size,
        sparse=sparse,
        dropout_p=dropout_p,
        seed=seed_number(seed),
        threads=torch.get_num_threads(),
    )
    return grads
