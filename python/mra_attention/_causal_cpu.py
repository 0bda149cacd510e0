"""The CPU kernels of the causal operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _core  # pyright: ignore[reportPrivateUsage]
from ._descriptors import Descriptor, describe, describe_optional, rows, seed_number
from ._outputs import empty_causal_outputs, empty_grads, empty_like_query, empty_out


def causal_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Tensor | None,
    seed: Tensor | None,
    offsets: Sequence[int],
    key_lengths: Sequence[int] | None,
    scale: float,
    block_size: int,
    sparse: bool,
    blocks: int,
    local_blocks: int,
    first_blocks: int,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the log-sum-exp and the plan: the given one, copied, or a new one."""
    out, lse, plan_out = empty_causal_outputs(query, key, value, plan, block_size, blocks, local_blocks, first_blocks)
    query, key, value = rows(query), rows(key), rows(value)
    plan = None if plan is None else plan.contiguous()
    _core.causal_forward(
        describe(query),
        describe(key),
        describe(value),
        None,
        None,
        describe_optional(plan),
        describe(plan_out),
        describe(out),
        describe(lse),
        offsets=offsets,
        key_lengths=key_lengths,
        scale=scale,
        block_size=block_size,
        sparse=sparse,
        blocks=blocks,
        local_blocks=local_blocks,
        first_blocks=first_blocks,
        dropout_p=dropout_p,
        seed=seed_number(seed),
        threads=torch.get_num_threads(),
    )
    return out, lse, plan_out


def attend(
    query: Tensor,
    value_dim: int,
    stored: Sequence[Descriptor],
    offsets: Sequence[int],
    key_lengths: Sequence[int],
    scale: float,
    block_size: int,
    sparse: bool,
    blocks: int,
    local_blocks: int,
    first_blocks: int,
    *,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the output and, if wanted, the log-sum-exp for stored keys, values, and the averages of both."""
    key, value, key_means, value_means = stored
    out, lse = empty_like_query(query, value_dim) if with_lse else (empty_out(query, value_dim), None)
    query = rows(query)
    _core.causal_forward(
        describe(query),
        key,
        value,
        key_means,
        value_means,
        None,
        None,
        describe(out),
        describe_optional(lse),
        offsets=offsets,
        key_lengths=key_lengths,
        scale=scale,
        block_size=block_size,
        sparse=sparse,
        blocks=blocks,
        local_blocks=local_blocks,
        first_blocks=first_blocks,
        dropout_p=0.0,
        seed=0,
        threads=torch.get_num_threads(),
    )
    return out, lse


def causal_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Tensor,
    seed: Tensor | None,
    offsets: Sequence[int],
    key_lengths: Sequence[int] | None,
    scale: float,
    block_size: int,
    sparse: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    grads = empty_grads(query, key, value)
    grad_out, query, key, value, out = rows(grad_out), rows(query), rows(key), rows(value), rows(out)
    lse, plan = lse.contiguous(), plan.contiguous()
    _core.causal_backward(
        describe(grad_out),
        describe_optional(grad_lse),
        describe(query),
        describe(key),
        describe(value),
        describe(out),
        describe(lse),
        describe(plan),
        describe(grads[0]),
        describe(grads[1]),
        describe(grads[2]),
        offsets=offsets,
        key_lengths=key_lengths,
        scale=scale,
        block_size=block_size,
        sparse=sparse,
        dropout_p=dropout_p,
        seed=seed_number(seed),
        threads=torch.get_num_threads(),
    )
    return grads


def append(
    key: Tensor,
    value: Tensor,
    stored: Sequence[Descriptor],
    before: Sequence[int],
    after: Sequence[int],
    block_size: int,
) -> None:
    """Put new keys and values behind stored ones, and the means of blocks that become complete into theirs."""
    key, value = rows(key), rows(value)
    _core.append(
        describe(key),
        describe(value),
        *stored,
        before=before,
        after=after,
        block_size=block_size,
        threads=torch.get_num_threads(),
    )
