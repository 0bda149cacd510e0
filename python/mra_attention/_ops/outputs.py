"""Fresh tensors for the results of the operators, allocated alike by the CPU kernels and by the fake kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import Inputs, Settings
from .sizes import is_one, plan_bytes


def memory_order(like: Tensor) -> list[int]:
    """Return batch, heads and positions (0, 1, 2) as they lie in memory, the outermost first.

    What has a single element or is repeated lies nowhere and keeps its place.
    """
    sizes, strides = like.shape, like.stride()
    moved = [dim for dim in range(3) if not is_one(sizes[dim])]
    order = list(moved)
    for end in range(len(order) - 1, 0, -1):
        for at in range(end):
            outer, inner = order[at], order[at + 1]
            if 0 < strides[outer] < strides[inner]:
                order[at], order[at + 1] = inner, outer
    places = iter(order)
    return [next(places) if dim in moved else dim for dim in range(3)]


def _empty(like: Tensor, channels: int, tokens_first: bool = False) -> Tensor:
    """Allocate `(B, H, L, channels)` for the first three sizes of `like`, in the order in which `like` is stored.

    A model that stores `(B, L, H, D)` or `(L, B, H, D)` then gets an output that it can flatten without a copy. Strides
    are given rather than a transpose taken: autograd forbids in-place changes of a view that was made inside a custom
    function.
    """
    batch, heads, length, _ = like.shape
    if tokens_first:
        order = [0, 2, 1]
    elif type(like) is Tensor and like.is_contiguous():
        # The same as below, faster.
        if channels == like.shape[3]:
            return torch.empty_like(like, memory_format=torch.contiguous_format)
        return torch.empty((batch, heads, length, channels), dtype=like.dtype, device=like.device)
    else:
        order = memory_order(like)
    strides, step = [0, 0, 0, 1], channels
    if type(channels) is int and channels == 0:
        step = 1
    for dim in reversed(order):
        strides[dim] = step
        size = like.shape[dim]
        step = step * (max(size, 1) if type(size) is int else size)
    return torch.empty_strided((batch, heads, length, channels), strides, dtype=like.dtype, device=like.device)


def is_packed(inputs: Inputs) -> bool:
    """Return whether the tensors hold packed sequences."""
    return inputs.cu_seqlens_q is not None


def empty_plan(inputs: Inputs, settings: Settings) -> Tensor:
    """Allocate a plan: uint8 `(B, bytes)`."""
    batch, heads, query_length, _ = inputs.query.shape
    sequences = None if inputs.cu_seqlens_q is None else inputs.cu_seqlens_q.shape[0] - 1
    has_bias = inputs.attn_bias is not None
    size = plan_bytes(heads, query_length, inputs.key.shape[2], settings, has_bias, sequences)
    return torch.empty((batch, size), dtype=torch.uint8, device=inputs.query.device)


def empty_out(query: Tensor, value_dim: int, tokens_first: bool = False) -> Tensor:
    """Allocate the output."""
    return _empty(query, value_dim, tokens_first)


def empty_lse(query: Tensor) -> Tensor:
    """Allocate the log-sum-exp."""
    dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    return torch.empty(query.shape[:3], dtype=dtype, device=query.device)


def empty_results(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the output, the log-sum-exp and the plan."""
    out = empty_out(inputs.query, inputs.value.shape[3], is_packed(inputs))
    return out, empty_lse(inputs.query), empty_plan(inputs, settings)


def empty_grads(inputs: Inputs, wants_grad_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate the gradients of query, key, value, bias and sinks; the last two are empty if they are not wanted."""
    packed = is_packed(inputs)
    query, key, value = inputs[:3]
    sinks = 0 if inputs.sinks is None else query.shape[1]
    return (
        _empty(query, query.shape[3], packed),
        _empty(key, key.shape[3], packed),
        _empty(value, value.shape[3], packed),
        _empty_grad_bias(inputs, wants_grad_bias),
        torch.empty((query.shape[0], sinks), dtype=torch.float64, device=query.device),
    )


def _empty_grad_bias(inputs: Inputs, wanted: bool) -> Tensor:
    query, bias = inputs.query, inputs.attn_bias
    if not wanted:
        return torch.empty(0, dtype=query.dtype, device=query.device)
    if bias is None or not bias.is_floating_point():
        given = "None" if bias is None else f"a {bias.dtype} tensor"
        raise ValueError(f"wants_grad_bias=True, but attn_bias is {given}; a floating point bias has a gradient")
    return torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
