"""Attention of nested tensors: jagged ones are packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._varlen import varlen_attention


def _parts(name: str, tensor: Any) -> tuple[Tensor, Tensor]:
    """Check one of query, key and value, `(B, heads, j, channels)`; return it packed, and the boundaries."""
    if not isinstance(tensor, Tensor) or not tensor.is_nested:
        found = "a dense tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a nested tensor, as another one of query, key and value is; got {found}")
    if tensor.layout is not torch.jagged:
        raise NotImplementedError(
            f"{name} is a nested tensor of layout {tensor.layout}; only layout=torch.jagged is supported, for example "
            "torch.nested.nested_tensor(..., layout=torch.jagged)"
        )
    jagged: Any = tensor
    if tensor.dim() != 4 or jagged._ragged_idx != 2:
        raise ValueError(
            f"{name} must have the dimensions (batch, heads, jagged length, channels), got {tensor.dim()} dimensions "
            f"of which dimension {jagged._ragged_idx} is jagged. A tensor (batch, jagged length, heads, channels) is "
            "passed as its transpose(1, 2)"
        )
    if jagged.lengths() is not None:
        raise ValueError(f"{name} has gaps between its sequences; pass a contiguous copy, {name}.contiguous()")
    return jagged.transpose(1, 2).values(), jagged.offsets()


def check_arguments(attn_mask: Any, query_padding_mask: Any, plan: Any) -> None:
    """Check that no argument comes along that nested tensors do not have."""
    for name, value, instead in (
        ("attn_mask", attn_mask, "a nested tensor has no padding to mask; for causal attention pass is_causal=True"),
        ("query_padding_mask", query_padding_mask, "a nested tensor has no padding to mask"),
        ("plan", plan, "call for each sequence alone, or leave it out"),
    ):
        if value is not None:
            raise ValueError(f"{name} cannot be used with nested tensors; {instead}")


def attention(query: Any, key: Any, value: Any, return_lse: bool, **settings: Any) -> Tensor | tuple[Tensor, Tensor]:
    """Return the output, `(B, H, j, Dv)` jagged as query, and with `return_lse` the log-sum-exp `(B, H, j)`."""
    (packed_query, offsets), (packed_key, key_offsets), (packed_value, _) = (
        _parts(name, tensor) for name, tensor in (("query", query), ("key", key), ("value", value))
    )
    if key.shape[2] != value.shape[2] or query.shape[0] != key.shape[0]:
        raise ValueError(
            "key and value must have the same jagged lengths, and query as many sequences, got query "
            f"{tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    boundaries = (offsets, key_offsets)
    out, lse = varlen_attention(packed_query, packed_key, packed_value, *boundaries, return_lse=True, **settings)
    jagged = torch.nested.nested_tensor_from_jagged(out, offsets).transpose(1, 2)
    if not return_lse:
        return jagged
    return jagged, torch.nested.nested_tensor_from_jagged(lse.t(), offsets).transpose(1, 2)
