"""The CPU kernels of the operators: torch tensors in, pointers to the native module, torch tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from .. import _core  # pyright: ignore[reportPrivateUsage]
from .._native.descriptors import Descriptor, describe, describe_optional, rows
from .arguments import Inputs, Settings, of_backward, of_forward, of_select
from .outputs import empty_grads, empty_lse, empty_out, empty_plan, empty_results, is_packed

# Keys, values, and of every level of blocks, the coarsest first, the averages of both.
Stored: TypeAlias = tuple[Descriptor, Descriptor, tuple[Descriptor, ...], tuple[Descriptor, ...]]
HeadTerms: TypeAlias = tuple[Descriptor | None, Descriptor | None]
Masks: TypeAlias = tuple[Descriptor | None, Descriptor | None, Descriptor | None, Descriptor | None]


def _masks(inputs: Inputs) -> Masks:
    """Describe key_mask, query_mask, attn_bias and mask_tiles."""
    key_mask, query_mask, bias, tiles = inputs[3:7]
    if key_mask is None and query_mask is None and bias is None and tiles is None:
        return None, None, None, None
    return describe_masks(inputs.query.shape, inputs.key.shape, inputs[3:7])


def describe_masks(query: Sequence[int], key: Sequence[int], masks: tuple[Tensor | None, ...]) -> Masks:
    """Describe masks for these shapes; a mask or bias of pairs, or a grid of blocks, is repeated by strides of 0."""
    key_mask, query_mask, bias, tiles = masks
    if bias is not None:
        rows_of, columns_of = (1, 1) if tiles is None else tiles.shape[1:]
        bias = bias.expand(query[0], query[1], -(-query[2] // rows_of), -(-key[2] // columns_of))
    return (
        None if key_mask is None else describe(rows(key_mask)),
        None if query_mask is None else describe(rows(query_mask)),
        describe_optional(bias),
        None if tiles is None else describe(tiles.contiguous()),
    )


def describe_head_terms(alibi_slopes: Tensor | None, sinks: Tensor | None) -> HeadTerms:
    """Describe numbers for each head of each batch item, which may be repeated by strides of 0."""
    slopes = None if alibi_slopes is None else describe(alibi_slopes.contiguous())
    return slopes, None if sinks is None else describe(sinks.contiguous())


def read_boundaries(inputs: Inputs) -> tuple[list[int], list[int]] | None:
    """Read and check the boundaries of packed sequences."""
    if inputs.cu_seqlens_q is None and inputs.cu_seqlens_k is None:
        return None
    if inputs.cu_seqlens_q is None or inputs.cu_seqlens_k is None:
        raise ValueError("cu_seqlens_q and cu_seqlens_k belong together, but one of them is None")
    queries = cast("list[int]", inputs.cu_seqlens_q.tolist())  # pyright: ignore[reportUnknownMemberType]
    keys = cast("list[int]", inputs.cu_seqlens_k.tolist())  # pyright: ignore[reportUnknownMemberType]
    _check_boundaries("cu_seqlens_q", queries, inputs.query.shape[2])
    _check_boundaries("cu_seqlens_k", keys, inputs.key.shape[2])
    if len(queries) != len(keys):
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must be of equal length, got {len(queries)} and {len(keys)} boundaries"
        )
    return queries, keys


def _check_boundaries(name: str, boundaries: list[int], total: int) -> None:
    rising = boundaries == sorted(boundaries)
    if not boundaries or boundaries[0] != 0 or boundaries[-1] != total or not rising:
        raise ValueError(f"{name} must rise from 0 to the number of tokens, which is {total}; got {boundaries}")


def _seed(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed.item()) % 2**64


def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the log-sum-exp and the plan: the given one, copied, or a new one."""
    inputs, settings = of_forward(args)
    out, lse, plan = empty_results(inputs, settings)
    _forward(inputs, settings, out, describe(lse), describe(plan))
    return out, lse, plan


def forward_out(inputs: Inputs, settings: Settings) -> Tensor:
    """Return the output alone."""
    out = empty_out(inputs.query, inputs.value.shape[3], is_packed(inputs))
    _forward(inputs, settings, out, None, None)
    return out


def _forward(
    inputs: Inputs, settings: Settings, out: Tensor, lse: Descriptor | None, plan_out: Descriptor | None
) -> None:
    plan = None if inputs.plan is None else inputs.plan.contiguous()
    query, key, value = rows(inputs.query), rows(inputs.key), rows(inputs.value)
    _core.forward(
        describe(query),
        describe(key),
        describe(value),
        _masks(inputs),
        describe_head_terms(inputs.alibi_slopes, inputs.sinks),
        describe_optional(plan),
        plan_out,
        describe(out),
        lse,
        settings=settings,
        sequences=read_boundaries(inputs),
        seed=_seed(inputs.seed),
        threads=torch.get_num_threads(),
    )


def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value, bias and sinks; the last two are empty if they are not wanted."""
    grad_out, grad_lse, inputs, out, lse, wants_grad_bias, settings = of_backward(args)
    if inputs.plan is None:
        raise ValueError("plan is None, but a gradient belongs to the selection of its forward pass; pass plan_out")
    grads = empty_grads(inputs, wants_grad_bias)
    grad_out, query, key, value = rows(grad_out), rows(inputs.query), rows(inputs.key), rows(inputs.value)
    plan, out, lse = inputs.plan.contiguous(), rows(out), lse.contiguous()
    _core.backward(
        describe(grad_out),
        describe_optional(grad_lse),
        describe(query),
        describe(key),
        describe(value),
        _masks(inputs),
        describe_head_terms(inputs.alibi_slopes, inputs.sinks),
        describe(plan),
        describe(out),
        describe(lse),
        describe(grads[0]),
        describe(grads[1]),
        describe(grads[2]),
        describe(grads[3]) if wants_grad_bias else None,
        describe(grads[4]) if inputs.sinks is not None else None,
        settings=settings,
        sequences=read_boundaries(inputs),
        seed=_seed(inputs.seed),
        threads=torch.get_num_threads(),
    )
    return grads


def select(*args: Any) -> Tensor:
    """Return the plan of the inputs."""
    inputs, settings = of_select(args)
    plan = empty_plan(inputs, settings)
    query, key = rows(inputs.query), rows(inputs.key)
    _core.select(
        describe(query),
        describe(key),
        _masks(inputs),
        describe_head_terms(inputs.alibi_slopes, inputs.sinks),
        describe(plan),
        settings=settings,
        sequences=read_boundaries(inputs),
        threads=torch.get_num_threads(),
    )
    return plan


def attend_cache(
    query: Tensor,
    value_dim: int,
    stored: Stored,
    offsets: Sequence[int],
    key_lengths: Sequence[int],
    settings: Settings,
    *,
    head_terms: tuple[Tensor | None, Tensor | None] = (None, None),
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the output and, if wanted, the log-sum-exp for stored keys, values, and the averages of both."""
    out = empty_out(query, value_dim)
    lse = empty_lse(query) if with_lse else None
    query = rows(query)
    _core.attend_cache(
        describe(query),
        *stored,
        describe_head_terms(*head_terms),
        describe(out),
        describe_optional(lse),
        settings=settings,
        offsets=list(offsets),
        key_lengths=list(key_lengths),
        threads=torch.get_num_threads(),
    )
    return out, lse


def append(
    key: Tensor,
    value: Tensor,
    stored: Stored,
    before: Sequence[int],
    after: Sequence[int],
    block_sizes: Sequence[int],
) -> None:
    """Put new keys and values behind stored ones, and the means of blocks that become complete into theirs."""
    key, value = rows(key), rows(value)
    _core.append(
        describe(key),
        describe(value),
        *stored,
        before=before,
        after=after,
        block_sizes=block_sizes,
        threads=torch.get_num_threads(),
    )
