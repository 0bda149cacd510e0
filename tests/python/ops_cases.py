"""Small inputs for the tests of the operators: shapes, layouts, masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mra_attention import scaled_dot_product_attention
from torch import Tensor

OPS = torch.ops.mra_attention
BLOCK_SIZE = 8
SETTINGS: dict[str, Any] = {"resolutions": (BLOCK_SIZE, 1), "blocks_per_row": 1.5}

# name: (batch, heads, key heads, query length, key length, head_dim, value head_dim)
SHAPES = {
    "blocks": (2, 2, 2, 16, 16, 4, 4),
    "ragged": (1, 2, 2, 19, 27, 4, 5),
    "grouped": (2, 4, 2, 9, 20, 4, 4),
    "one-token": (1, 1, 1, 1, 1, 3, 3),
    "long-row": (1, 1, 1, 8, 75, 2, 2),  # ten key blocks: two bytes of a plan
}
LAYOUTS = ["contiguous", "heads-inside", "strided", "expanded"]
by_shape = pytest.mark.parametrize("shape", SHAPES)
by_mode = pytest.mark.parametrize("mode", ["full", "sparse"])
by_mask = pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "masks"])


def inputs(shape: str = "ragged", dtype: torch.dtype = torch.float64, layout: str = "contiguous") -> list[Tensor]:
    batch, heads, key_heads, query_length, key_length, head_dim, value_dim = SHAPES[shape]
    sizes = [
        (batch, heads, query_length, head_dim),
        (batch, key_heads, key_length, head_dim),
        (batch, key_heads, key_length, value_dim),
    ]
    return [lay_out(torch.randn(size, dtype=dtype), layout).requires_grad_() for size in sizes]


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "heads-inside":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return tensor[:, :, :1].expand_as(tensor)
    return tensor


def masks(shape: str, masked: bool) -> tuple[Tensor | None, Tensor | None]:
    """Masks of keys and queries that leave out some, among them the whole first block of keys."""
    batch, _, _, query_length, key_length, _, _ = SHAPES[shape]
    if not masked:
        return None, None
    key_mask, query_mask = torch.rand(batch, key_length) > 0.3, torch.rand(batch, query_length) > 0.3
    if key_length > BLOCK_SIZE:
        key_mask[:, :BLOCK_SIZE] = False
    return key_mask, query_mask


def keywords(shape: str, masked: bool, mode: str = "full") -> dict[str, Any]:
    key_mask, query_mask = masks(shape, masked)
    return SETTINGS | {
        "attn_mask": None if key_mask is None else key_mask[:, None, None, :],
        "query_padding_mask": query_mask,
        "enable_gqa": True,
        "mode": mode,
    }


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, **SETTINGS)


def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention(query, key, value).square().sum()


def detached(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]
