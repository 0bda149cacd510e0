"""The CPU kernels of attention over packed sequences: those of a single sequence, once for each, on views.

Nothing is copied and nothing is padded: the descriptor of a sequence is that of the packed tensor, moved to its first
token. So a sequence gets the bits that it gets alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor

from . import _core  # pyright: ignore[reportPrivateUsage]
from ._descriptors import Descriptor, describe, rows, seed_number
from ._outputs import budget_of_a_token, causal_plan_width, empty_packed_grads, empty_packed_outputs

_GOLDEN_RATIO = 0x9E3779B97F4A7C15


class _Packed:
    """A packed tensor `(total, heads, channels)` or `(total, heads)`."""

    def __init__(self, tensor: Tensor) -> None:
        tensor = rows(tensor) if tensor.dim() == 3 else tensor
        self.address, sizes, self.strides, self.code, self.tensor = describe(tensor)
        self.tail = tuple(sizes[1:])
        self.token_bytes = self.strides[0] * tensor.element_size()

    def tokens(self, start: int, end: int) -> Descriptor:
        """Describe some tokens as `(1, heads, length, channels)` or `(1, heads, length)`."""
        heads, *channels = self.tail
        token_stride, head_stride, *channel_strides = self.strides
        sizes = torch.Size((1, heads, end - start, *channels))
        strides = (max(1, (end - start) * token_stride), head_stride, token_stride, *channel_strides)
        return self.address + start * self.token_bytes, sizes, strides, self.code, self.tensor


class _Sequence(NamedTuple):
    """A sequence: the first query and the one behind the last, likewise for the keys, and its plan."""

    query: tuple[int, int]
    key: tuple[int, int]
    plan: Descriptor
    offset: int
    seed: int


def _boundaries(name: str, cu_seqlens: Tensor, total: int) -> list[int]:
    """Check the boundaries of the sequences."""
    boundaries = cast("list[int]", cu_seqlens.tolist())  # pyright: ignore[reportUnknownMemberType]
    rising = all(a <= b for a, b in itertools.pairwise(boundaries))
    if not boundaries or boundaries[0] != 0 or boundaries[-1] != total or not rising:
        raise ValueError(f"{name} must rise from 0 to the number of tokens, which is {total}; got {boundaries}")
    return boundaries


def _sequences(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    plans: Tensor,
    seed: Tensor | None,
    block_size: int,
    causal: bool,
    lower_right: bool,
    width: int,
) -> Iterator[_Sequence]:
    """Yield the sequences that have a query or a key; `width` is the most blocks of a token's plan."""
    queries = _boundaries("cu_seqlens_q", cu_seqlens_q, query.shape[0])
    keys = _boundaries("cu_seqlens_k", cu_seqlens_k, key.shape[0])
    if len(queries) != len(keys):
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must be of equal length, got {len(queries)} and {len(keys)} boundaries"
        )
    heads, first, place = query.shape[1], seed_number(seed), 0
    both = zip(itertools.pairwise(queries), itertools.pairwise(keys), strict=True)
    for index, (of_queries, of_keys) in enumerate(both):
        length, key_length = of_queries[1] - of_queries[0], of_keys[1] - of_keys[0]
        key_blocks = (key_length + block_size - 1) // block_size
        if causal:
            shape = (1, heads, length, min(key_blocks, width))
        else:
            shape = (1, heads, (length + block_size - 1) // block_size, (key_blocks + 7) // 8)
        count = heads * shape[2] * shape[3]
        if length or key_length:
            plan = describe(plans[place : place + count].view(shape))
            # Every sequence drops other weights.
            mixed = (first + index * _GOLDEN_RATIO) % 2**64
            offset = key_length - length if lower_right else 0
            yield _Sequence(of_queries, of_keys, plan, offset, mixed)
        place += count


def varlen_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    scale: float,
    block_size: int,
    sparse: bool,
    causal: bool,
    lower_right: bool,
    dropout_p: float,
    blocks_per_row: float,
    num_blocks: int | None,
    first_blocks: int,
    diagonal_blocks: int,
    local_blocks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the log-sum-exp and the plans, one after the other."""
    count = cu_seqlens_q.shape[0] - 1
    outputs = empty_packed_outputs(
        query, key, value, count, block_size, causal, blocks_per_row, local_blocks, first_blocks
    )
    q, k, v, o = _Packed(query), _Packed(key), _Packed(value), _Packed(outputs[0])
    lse = _Packed(outputs[1].t())
    blocks, threads = budget_of_a_token(blocks_per_row), torch.get_num_threads()
    width = causal_plan_width(key.shape[0], block_size, blocks, local_blocks, first_blocks)
    boundaries = (cu_seqlens_q, cu_seqlens_k, outputs[2], seed)
    for at in _sequences(query, key, *boundaries, block_size, causal, lower_right, width):
        inputs = (q.tokens(*at.query), k.tokens(*at.key), v.tokens(*at.key))
        results = (None, at.plan, o.tokens(*at.query), lse.tokens(*at.query))
        if causal:
            _core.causal_forward(
                *inputs,
                None,
                None,
                *results,
                offsets=[at.offset],
                key_lengths=None,
                scale=scale,
                block_size=block_size,
                sparse=sparse,
                blocks=blocks,
                local_blocks=local_blocks,
                first_blocks=first_blocks,
                dropout_p=dropout_p,
                seed=at.seed,
                threads=threads,
            )
        else:
            _core.forward(
                *inputs,
                None,
                None,
                None,
                *results,
                scale=scale,
                block_size=block_size,
                sparse=sparse,
                dropout_p=dropout_p,
                seed=at.seed,
                blocks_per_row=blocks_per_row,
                num_blocks=num_blocks,
                first_blocks=first_blocks,
                diagonal_blocks=diagonal_blocks,
                threads=threads,
            )
    return outputs


def varlen_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    plans: Tensor,
    seed: Tensor | None,
    scale: float,
    block_size: int,
    sparse: bool,
    causal: bool,
    lower_right: bool,
    dropout_p: float,
    blocks: int,
    first_blocks: int,
    local_blocks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    grads = empty_packed_grads(query, key, value)
    dq, dk, dv = (_Packed(grad) for grad in grads)
    g, q, k, v, o = _Packed(grad_out), _Packed(query), _Packed(key), _Packed(value), _Packed(out)
    z, gz = _Packed(lse.t()), None if grad_lse is None else _Packed(grad_lse.t())
    threads = torch.get_num_threads()
    width = causal_plan_width(key.shape[0], block_size, blocks, local_blocks, first_blocks)
    boundaries = (cu_seqlens_q, cu_seqlens_k, plans, seed)
    for at in _sequences(query, key, *boundaries, block_size, causal, lower_right, width):
        saved = (
            g.tokens(*at.query),
            None if gz is None else gz.tokens(*at.query),
            q.tokens(*at.query),
            k.tokens(*at.key),
            v.tokens(*at.key),
            o.tokens(*at.query),
            z.tokens(*at.query),
        )
        results = (at.plan, dq.tokens(*at.query), dk.tokens(*at.key), dv.tokens(*at.key))
        if causal:
            _core.causal_backward(
                *saved,
                *results,
                offsets=[at.offset],
                key_lengths=None,
                scale=scale,
                block_size=block_size,
                sparse=sparse,
                dropout_p=dropout_p,
                seed=at.seed,
                threads=threads,
            )
        else:
            _core.backward(
                *saved,
                None,
                None,
                None,
                *results,
                scale=scale,
                block_size=block_size,
                sparse=sparse,
                dropout_p=dropout_p,
                seed=at.seed,
                threads=threads,
            )
    return grads
