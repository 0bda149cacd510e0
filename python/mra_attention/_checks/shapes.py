"""Inputs of any accepted shape, brought to the four dimensions that the operators take.

Shapes broadcast as those of torch's own attention do. `lead` is the common shape of everything before
`(length, head_dim)`: batch dimensions, then the heads. The batch dimensions are flattened into one; a missing batch or
head dimension counts as 1.
"""

from __future__ import annotations

import math
from typing import NoReturn, TypeAlias

import torch
from torch import Tensor

Shape: TypeAlias = tuple[int, ...]


def arrange(tensors: tuple[Tensor, ...], enable_gqa: bool) -> tuple[tuple[Tensor, ...], Shape | None]:
    """Bring (query, key) or (query, key, value) to `(B, H, Lq, D)`, `(B, Hk, Lk, D)`, `(B, Hk, Lk, Dv)`.

    Returns
    -------
    tuple of Tensor
        The 4-D tensors: views where that is possible.
    tuple of int or None
        `lead` of the result, or None if the inputs were 4-D with equal batches, so that the result needs no reshaping.
    """
    query, key, value = tensors[0].shape, tensors[1].shape, tensors[-1].shape
    if len(query) == len(key) == len(value) == 4:
        (batch, heads, _, channels), (key_batch, key_heads, length, key_channels) = query, key
        if (
            batch == key_batch
            and batch == value[0]
            and key_heads == value[1]
            and length == value[2]
            and channels == key_channels
            and channels > 0
            and (heads == key_heads or (enable_gqa and key_heads > 0 and heads % key_heads == 0))
        ):
            return tensors, None
    return _arrange_any(tensors, enable_gqa)


def _arrange_any(tensors: tuple[Tensor, ...], enable_gqa: bool) -> tuple[tuple[Tensor, ...], Shape]:
    names = ("query", "key", "value")
    for name, tensor in zip(names, tensors, strict=False):
        if tensor.dim() < 2:
            raise ValueError(
                f"{name} must have at least two dimensions (..., length, head_dim), got the shape {text(tensor.shape)}"
            )
    query, key, value = tensors[0], tensors[1], tensors[-1]
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            "query and key must have the same head_dim (last dimension), got "
            f"{query.shape[-1]} in query {text(query.shape)} and {key.shape[-1]} in key {text(key.shape)}"
        )
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(
            "key and value must have the same length (second to last dimension), got "
            f"{key.shape[-2]} in key {text(key.shape)} and {value.shape[-2]} in value {text(value.shape)}"
        )
    if enable_gqa:
        tensors = _with_equal_heads(tensors)
    shapes = [tensor.shape[:-2] for tensor in tensors]
    if shapes[0] and shapes[0] == shapes[1] == shapes[-1]:
        *batch, heads = shapes[0]
        key_heads = heads
    else:
        batch = broadcast([shape[:-1] for shape in shapes])
        if batch is None:
            _refuse("the batch dimensions must be equal or 1", tensors)
        heads, key_heads = _heads([shape[-1] if shape else 1 for shape in shapes], tensors, enable_gqa)
    lead = (*batch, heads) if any(shapes) else ()
    count = math.prod(batch)
    arranged: list[Tensor] = []
    for tensor, shape, number in zip(tensors, shapes, (heads, key_heads, key_heads), strict=False):
        last = tensor.shape[-2:]
        if math.prod(shape) != count * number:
            tensor = tensor.expand(*batch, number, *last)
        arranged.append(tensor.reshape(count, number, *last))
    return with_a_channel(tuple(arranged)), lead


def with_a_channel(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Give query and key without channels one that is 0: all their logits are 0, so attention is the mean of values."""
    query, key, *value = tensors
    if query.shape[-1] != 0:
        return tensors
    return torch.nn.functional.pad(query, (0, 1)), torch.nn.functional.pad(key, (0, 1)), *value


def _with_equal_heads(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Repeat the heads of key and value to an equal number, as torch repeats both to that of the query."""
    if len(tensors) < 3 or any(tensor.dim() < 3 for tensor in tensors):
        return tensors
    query, key, value = tensors
    heads, key_heads, value_heads = query.shape[-3], key.shape[-3], value.shape[-3]
    if key_heads == value_heads or key_heads < 1 or value_heads < 1 or heads % key_heads or heads % value_heads:
        return tensors
    common = math.lcm(key_heads, value_heads)
    return (
        query,
        key.repeat_interleave(common // key_heads, -3),
        value.repeat_interleave(common // value_heads, -3),
    )


def _heads(heads: list[int], tensors: tuple[Tensor, ...], enable_gqa: bool) -> tuple[int, int]:
    """Return the number of heads of the query and of key and value, after broadcasting or grouping."""
    query, key, value = heads[0], heads[1], heads[-1]
    if enable_gqa:
        if key != value or key < 1 or query % key:
            _refuse("with enable_gqa=True, the numbers of heads of key and of value must divide query's", tensors)
        return query, key
    common = broadcast([(number,) for number in heads])
    if common is None:
        hint = "; enable_gqa=True would group them" if key == value and key > 0 and query % key == 0 else ""
        _refuse("the numbers of heads (third to last dimension) must be equal or 1" + hint, tensors)
    return common[0], 1 if key == value == 1 else common[0]


def broadcast(shapes: list[Shape]) -> Shape | None:
    """Return the common shape, or None if there is none."""
    rank = max(len(shape) for shape in shapes)
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    common: list[int] = []
    for sizes in zip(*padded, strict=True):
        # A loop and no next() with a default, which Dynamo of torch 2.5 cannot trace.
        size = 1
        for other in sizes:
            if other != 1:
                if size not in (1, other):
                    return None
                size = other
        common.append(size)
    return tuple(common)


def text(shape: Shape) -> str:
    """Return a shape as it is written in Python."""
    return str(tuple(shape))


def _refuse(rule: str, tensors: tuple[Tensor, ...]) -> NoReturn:
    names = ("query", "key", "value")
    given = ", ".join(f"{name} {text(tensor.shape)}" for name, tensor in zip(names, tensors, strict=False))
    raise ValueError(f"{rule}; got the shapes {given}")
