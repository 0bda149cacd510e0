"""Projections, masks and heads around the attention of this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import tensors
from ..config import MRAConfig
from ..functional import scaled_dot_product_attention
from .masks import combine


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    batch_first: bool = False,
    config: MRAConfig,
) -> tuple[Tensor, None]:
    """Compute what the function of this name in torch.nn.functional computes, with this package's attention.

    The arguments are those of torch's function, and `batch_first` and `config`. It refuses `need_weights`, `static_k`
    and `static_v`. `average_attn_weights` says nothing without weights, as in torch. `is_causal=True` needs no
    `attn_mask`; one that is given is taken for the causal mask, as torch says. In cross-attention, where `query` is not
    `key`, every token chooses blocks for itself: `pool_queries` counts in self-attention only. So does `grid`, which is
    refused there: query and key are not one image, even if they are equally long.
    """
    if need_weights:
        raise ValueError(
            "need_weights=True asks for the attention weights, which this attention does not have as a matrix; pass "
            "need_weights=False"
        )
    if static_k is not None or static_v is not None:
        raise NotImplementedError(
            "static_k and static_v are not supported; pass None, or call "
            "torch.nn.functional.multi_head_attention_forward"
        )
    if query is not key and config.grid is not None:
        raise ValueError(
            f"grid={config.grid} is for self-attention, where one tensor is query and key, but these are two; use a "
            "config without grid for cross-attention"
        )
    batched = _check_inputs(query, key, value, embed_dim_to_check, num_heads, 0 if batch_first else 1)
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight
    q, k, v = (_batch_first(x, batched, batch_first) for x in _project(query, key, value, weights, in_proj_bias))
    keys = k.shape[1]
    k, v = _with_added_keys(k, v, bias_k, bias_v, add_zero_attn)
    if key_padding_mask is not None and not batched:
        key_padding_mask = key_padding_mask.unsqueeze(0)
    shape = (q.shape[0], num_heads, q.shape[1], keys)
    mask, causal = combine(attn_mask, key_padding_mask, is_causal, shape, k.shape[1] - keys, query.dtype)
    # Only in self-attention is a query padding where the key of that position is.
    queries = None if mask is None or query is key else q.new_ones(q.shape[:2], dtype=torch.bool)
    q, k, v = (_heads_first(x, num_heads) for x in (q, k, v))
    dropout_p = dropout_p if training else 0.0
    if query is not key:
        # A token of a decoder must not learn from later ones, which averages of queries would have it do.
        config = replace(config, pool_queries=False)
    out = scaled_dot_product_attention(q, k, v, mask, dropout_p, causal, query_padding_mask=queries, config=config)
    out = out.transpose(1, 2).flatten(-2)
    if not batched:
        out = out.squeeze(0)
    elif not batch_first:
        out = out.transpose(0, 1)
    return F.linear(out, out_proj_weight, out_proj_bias), None


def _check_inputs(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_heads: int, batch_dimension: int
) -> bool:
    """Check what later steps would not name; return whether there is a batch dimension."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        tensors.check_dense(name, tensor)
        tensors.check_cpu(name, tensor)
    given = f"got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.dim() == key.dim() == value.dim() or query.dim() not in (2, 3):
        raise ValueError(f"query, key and value must all have two dimensions, or three with a batch; {given}")
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
    if query.shape[-1] != embed_dim:
        raise ValueError(f"the last dimension of query must be embed_dim, {embed_dim}; {given}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"key and value must have the same length and batch; {given}")
    batched = query.dim() == 3
    if batched and query.shape[batch_dimension] != key.shape[batch_dimension]:
        raise ValueError(f"query and key must have the same batch, dimension {batch_dimension}; {given}")
    return batched


def _project(query: Tensor, key: Tensor, value: Tensor, weights: Any, bias: Tensor | None) -> Sequence[Tensor]:
    """Project to queries, keys and values; at once, if all come from one tensor."""
    if isinstance(weights, Tensor):
        if query is key and key is value:
            return F.linear(query, weights, bias).chunk(3, -1)
        weights = weights.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return [F.linear(*each) for each in zip((query, key, value), weights, biases, strict=True)]


def _batch_first(tensor: Tensor, batched: bool, batch_first: bool) -> Tensor:
    if not batched:
        return tensor.unsqueeze(0)
    return tensor if batch_first else tensor.transpose(0, 1)


def _heads_first(tensor: Tensor, num_heads: int) -> Tensor:
    """View `(B, L, embed_dim)` as `(B, H, L, D)`."""
    batch, length, channels = tensor.shape
    return tensor.view(batch, length, num_heads, channels // num_heads).transpose(1, 2)


def _with_added_keys(
    key: Tensor, value: Tensor, bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool
) -> tuple[Tensor, Tensor]:
    """Append the learned key and the key 0, where a module has them."""
    keys, values = [key], [value]
    if bias_k is not None and bias_v is not None:
        keys.append(bias_k.expand(key.shape[0], -1, -1).to(key.dtype))
        values.append(bias_v.expand(value.shape[0], -1, -1).to(value.dtype))
    if add_zero_attn:
        keys.append(torch.zeros_like(key[:, :1]))
        values.append(torch.zeros_like(value[:, :1]))
    return (key, value) if len(keys) == 1 else (torch.cat(keys, 1), torch.cat(values, 1))
