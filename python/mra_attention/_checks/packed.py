"""The arguments of a call with packed sequences, checked and brought to the form that the operators take."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .. import _order
from .._ops import Inputs, Settings
from ..config import configure
from . import calls, numbers, shapes, tensors
from .arguments import Arguments
from .autocast import autocast


def prepare(packed: tuple[Any, Any, Any], boundaries: tuple[Any, Any], arguments: Arguments) -> tuple[Inputs, Settings]:
    """Check the arguments of a call with query, key and value `(total, heads, channels)`."""
    is_causal, enable_gqa = arguments.is_causal, arguments.enable_gqa
    config = configure(arguments.config, arguments.settings)
    _order.refuse(arguments, config, "packed sequences")
    dropout_p = numbers.dropout(arguments.dropout_p)
    numbers.check_bool("is_causal", is_causal)
    numbers.check_bool("enable_gqa", enable_gqa)
    window = calls.visible_window(arguments.window_size, is_causal)
    needed = window != (-1, -1) or arguments.alibi_slopes is not None or not config.pool_queries
    lower_right = calls.is_lower_right(arguments.causal_alignment, needed)
    if torch.is_autocast_enabled("cpu"):
        packed = cast("tuple[Any, Any, Any]", autocast(packed))
    tensors.check_inputs(packed)
    _check_shapes(*packed, enable_gqa)
    cu_seqlens = [_boundaries(f"cu_seqlens_{name}", given) for name, given in zip("qk", boundaries, strict=True)]
    # (1, heads, total, channels), as a dense call with one batch item; a value with other heads is arranged like that.
    dense = tuple(tensor.transpose(0, 1).unsqueeze(0) for tensor in packed)
    (query, key, value), _ = shapes.arrange(dense, enable_gqa)
    scale = numbers.scale_or_default(arguments.scale, query.shape[3])
    config = config.for_length(max(query.shape[2], key.shape[2]))
    settings = calls.settings(config, query.shape[1], scale, arguments.softcap, window, lower_right, dropout_p)
    inputs = Inputs(query, key, value, cu_seqlens_q=cu_seqlens[0], cu_seqlens_k=cu_seqlens[1])
    return calls.with_head_terms(inputs, arguments), settings


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    given = f"got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 3 or key.dim() != 3 or value.dim() != 3:
        raise ValueError(f"query, key and value must have the three dimensions (tokens, heads, channels); {given}")
    if key.shape[0] != value.shape[0]:
        raise ValueError(f"key and value must have the same number of tokens; {given}")
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"query and key must have the same head_dim (last dimension); {given}")
    heads, of_key, of_value = query.shape[1], key.shape[1], value.shape[1]
    if enable_gqa:
        if of_key < 1 or of_value < 1 or heads % of_key or heads % of_value:
            raise ValueError(
                f"with enable_gqa=True, the numbers of heads of key and of value must divide query's; {given}"
            )
    elif heads != of_key or heads != of_value:
        hint = "; enable_gqa=True would group them" if 0 < of_key == of_value and heads % of_key == 0 else ""
        raise ValueError(f"the numbers of heads must be equal{hint}; {given}")


def _boundaries(name: str, given: Any) -> Tensor:
    """Return the boundaries of the sequences as a tensor; their values are checked when they are read."""
    if not isinstance(given, Tensor):
        if not isinstance(given, (list, tuple)):
            raise TypeError(f"{name} must be a tensor or a sequence of integers, got {type(given).__name__}")
        values = [numbers.integer(f"{name}[{i}]", x, 0) for i, x in enumerate(cast("list[Any]", given))]
        given = torch.tensor(values, dtype=torch.int64, device="cpu")
    tensors.check_dense(name, given)
    tensors.check_cpu(name, given)
    if given.dtype not in (torch.int32, torch.int64) or given.dim() != 1 or given.shape[0] < 1:
        raise ValueError(
            f"{name} must be an int32 or int64 tensor of one dimension, [0, ..., number of tokens], got {given.dtype} "
            f"of shape {tuple(given.shape)}"
        )
    return given
