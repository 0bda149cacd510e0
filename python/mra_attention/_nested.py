"""Attention of nested tensors: jagged ones are packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _observers, _order
from ._checks import calls, packed
from ._checks.arguments import Arguments
from ._ops import Inputs, Settings, forward
from .config import configure


def _check_jagged(name: str, tensor: Any) -> None:
    """Check one of query, key and value."""
    if not isinstance(tensor, Tensor) or not tensor.is_nested:
        found = "a dense tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a nested tensor, as another one of query, key and value is; got {found}")
    if tensor.layout is not torch.jagged:
        raise NotImplementedError(
            f"{name} is a nested tensor of layout {tensor.layout}; only layout=torch.jagged is supported, for example "
            "torch.nested.nested_tensor(..., layout=torch.jagged)"
        )
    jagged: Any = tensor
    if tensor.dim() != 4 or jagged._ragged_idx not in (1, 2):
        raise ValueError(
            f"{name} must have the dimensions (batch, heads, jagged length, channels), got {tensor.dim()} dimensions "
            f"of which dimension {jagged._ragged_idx} is jagged"
        )
    if jagged.lengths() is not None:
        raise ValueError(f"{name} has gaps between its sequences; pass a contiguous copy, {name}.contiguous()")


def _check_arguments(arguments: Arguments) -> None:
    """Check that no argument comes along that nested tensors do not have."""
    for name, instead in (
        ("attn_mask", "a nested tensor has no padding to mask; for causal attention pass is_causal=True"),
        ("query_padding_mask", "a nested tensor has no padding to mask"),
        ("plan", "call for each sequence alone, or leave it out"),
    ):
        if getattr(arguments, name) is not None:
            raise ValueError(f"{name} cannot be used with nested tensors; {instead}")
    _order.refuse(arguments, configure(arguments.config, arguments.settings), "nested tensors")


def _check_same_lengths(name: str, other: str, a: Any, b: Any) -> None:
    """Check that two tensors have the same jagged lengths: the same offsets, or equal ones."""
    if a.shape[0] == b.shape[0] and a.offsets() is b.offsets():
        return
    equal = a.shape[0] == b.shape[0] and a.values().shape[a._ragged_idx - 1] == b.values().shape[b._ragged_idx - 1]
    words = f"{name} and {other} must have the same jagged lengths"
    if equal and torch.compiler.is_compiling():
        # The lengths are not known here, so the compiled code checks them.
        assert_async: Any = torch.ops.aten._assert_async.msg
        assert_async((a.offsets() == b.offsets()).all(), words)
    elif not equal or not torch.equal(a.offsets(), b.offsets()):
        raise ValueError(f"{words}, got {name} {tuple(a.shape)} and {other} {tuple(b.shape)} of unequal offsets")


def prepare(query: Any, key: Any, value: Any, arguments: Arguments) -> tuple[Inputs, Settings]:
    """Check a call with nested tensors.

    Dimension 2 is jagged, as for sequences of unequal lengths `(B, H, j, D)`, or dimension 1 of `(B, j, L, D)`, as for
    torch's own attention: heads that differ in number from item to item, each of them a sequence of its own.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_jagged(name, tensor)
    _check_arguments(arguments)
    jagged = (query._ragged_idx, key._ragged_idx, value._ragged_idx)
    if len(set(jagged)) > 1:
        raise ValueError(f"query, key and value must be jagged in the same dimension, got dimensions {jagged}")
    if query.shape[0] != key.shape[0]:
        raise ValueError(
            "query must have as many sequences as key and value, got "
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    _check_same_lengths("key", "value", key, value)
    if jagged[0] == 1:
        _check_same_lengths("query", "key", query, key)
        prepared = calls.prepare(tuple(x.values().unsqueeze(1) for x in (query, key, value)), arguments)
        return prepared.inputs, prepared.settings
    query_values, key_values, value_values = (x.transpose(1, 2).values() for x in (query, key, value))
    return packed.prepare((query_values, key_values, value_values), (query.offsets(), key.offsets()), arguments)


def attention(
    query: Any, key: Any, value: Any, arguments: Arguments, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the output, jagged as query, and with `return_lse` the log-sum-exp, without the last dimension."""
    inputs, ready = prepare(query, key, value, arguments)
    _observers.tell((query, key, value), arguments)
    if ready.dropout_p != 0.0:
        inputs = inputs._replace(seed=calls.draw_seed())
    out, lse, _ = forward(inputs, ready)
    # Without them, to pad the result would pad it to the number of all tokens.
    shortest, longest = query._maybe_min_seqlen, query._maybe_max_seqlen

    def jagged(values: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(values, query.offsets(), min_seqlen=shortest, max_seqlen=longest)

    if query._ragged_idx == 1:
        return (jagged(out[:, 0]), jagged(lse[:, 0])) if return_lse else jagged(out[:, 0])
    out = jagged(out[0].transpose(0, 1)).transpose(1, 2)
    return (out, jagged(lse[0].t()).transpose(1, 2)) if return_lse else out
