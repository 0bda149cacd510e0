"""Attention over packed sequences: the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from . import _checks, _varlen_ops
from ._autocast import autocast
from ._causal import check_alone


@overload
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int],
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    causal_alignment: Literal["upper_left", "lower_right"] = "upper_left",
    scale: float | None = None,
    enable_gqa: bool = False,
    resolutions: Sequence[int] = (32, 1),
    blocks_per_row: float = 4.0,
    num_blocks: int | None = None,
    mode: Literal["full", "sparse"] = "full",
    first_blocks: int = 0,
    diagonal_blocks: int = 0,
    local_blocks: int = 1,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int],
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    causal_alignment: Literal["upper_left", "lower_right"] = "upper_left",
    scale: float | None = None,
    enable_gqa: bool = False,
    resolutions: Sequence[int] = (32, 1),
    blocks_per_row: float = 4.0,
    num_blocks: int | None = None,
    mode: Literal["full", "sparse"] = "full",
    first_blocks: int = 0,
    diagonal_blocks: int = 0,
    local_blocks: int = 1,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_k: Tensor | Sequence[int],
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    causal_alignment: Literal["upper_left", "lower_right"] = "upper_left",
    scale: float | None = None,
    enable_gqa: bool = False,
    resolutions: Sequence[int] = (32, 1),
    blocks_per_row: float = 4.0,
    num_blocks: int | None = None,
    mode: Literal["full", "sparse"] = "full",
    first_blocks: int = 0,
    diagonal_blocks: int = 0,
    local_blocks: int = 1,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over sequences of unequal lengths that are packed in one tensor, one behind the other.

    Each sequence attends to itself (or to its own keys) and gets what `scaled_dot_product_attention` gives for it
    alone, bit for bit. Nothing is padded.

    Parameters
    ----------
    query : Tensor
        `(total_q, H, D)`: the tokens of all sequences; float32, float64, bfloat16 or float16, on the CPU.
    key : Tensor
        `(total_k, Hk, D)`, dtype as `query`.
    value : Tensor
        `(total_k, Hk, Dv)`, dtype as `query`.
    cu_seqlens_q, cu_seqlens_k : Tensor or sequence of int
        Boundaries of the sequences, `[0, l_0, l_0 + l_1, ..., total]`: a tensor of int32 or int64, or integers. A
        sequence may be empty. The number of sequences must be the same for both.
    dropout_p, is_causal, scale, enable_gqa, resolutions, blocks_per_row, num_blocks, mode, first_blocks
        As in `scaled_dot_product_attention`, for every sequence.
    diagonal_blocks, local_blocks, return_lse
        Likewise.
    causal_alignment : {"upper_left", "lower_right"}, default "upper_left"
        With `is_causal=True`, whether the first queries or the last queries of a sequence are beside its first keys or
        its last ones: query `t` sees the keys up to `t`, or up to `t + l_k - l_q`. In flash-attention it is the latter.

    Returns
    -------
    out : Tensor
        `(total_q, H, Dv)`, contiguous.
    lse : Tensor
        Only with `return_lse=True`: `(H, total_q)`, as in flash-attention.

    Raises
    ------
    TypeError, ValueError
        As `scaled_dot_product_attention`; ValueError if the boundaries do not fit the tensors.
    NotImplementedError
        For other devices than the CPU, forward-mode and second derivatives, and below `torch.vmap`.

    Notes
    -----
    Definition: docs/definitions.md, sections 2 and 3. Deterministic, as `scaled_dot_product_attention`. The boundaries
    are read when the operator runs, so `torch.compile` needs no graph break for them.

    Examples
    --------
    >>> import torch
    >>> from mra_attention import varlen_attention
    >>> query, key, value = torch.randn(3, 500, 4, 64).unbind()  # sequences of 100, 300 and 100 tokens
    >>> boundaries = torch.tensor([0, 100, 400, 500])
    >>> varlen_attention(query, key, value, boundaries, boundaries, is_causal=True).shape
    torch.Size([500, 4, 64])
    """
    sparse = _checks.is_sparse(mode)
    dropout_p = _checks.dropout(dropout_p)
    for name, switch in (("return_lse", return_lse), ("enable_gqa", enable_gqa), ("is_causal", is_causal)):
        _checks.check_bool(name, switch)
    lower_right = _is_lower_right(causal_alignment, is_causal)
    numbers = (
        _checks.positive_float("blocks_per_row", blocks_per_row),
        None if num_blocks is None else _checks.integer("num_blocks", num_blocks, 1),
        _checks.integer("first_blocks", first_blocks, 0),
        _checks.integer("diagonal_blocks", diagonal_blocks, 0),
        _checks.integer("local_blocks", local_blocks, 1),
    )
    block_size = _checks.block_size(resolutions)
    if is_causal:
        check_alone(num_blocks, diagonal_blocks, None)
    else:
        _checks.check_not_causal(local_blocks)
    if torch.is_autocast_enabled("cpu"):
        query, key, value = autocast((query, key, value))
    _checks.check_inputs(query, key, value)
    _check_shapes(query, key, value, enable_gqa)
    boundaries = (_boundaries("cu_seqlens_q", cu_seqlens_q), _boundaries("cu_seqlens_k", cu_seqlens_k))
    scale = _checks.scale_or_default(scale, query.shape[2])
    seed = None if dropout_p == 0.0 else torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    settings = (scale, block_size, sparse, is_causal, lower_right, dropout_p)
    out, lse, _ = _varlen_ops.varlen_forward(query, key, value, *boundaries, seed, *settings, *numbers)
    return (out, lse) if return_lse else out


def _is_lower_right(alignment: Any, is_causal: bool) -> bool:
    if alignment not in ("upper_left", "lower_right"):
        raise ValueError(f"causal_alignment must be 'upper_left' or 'lower_right', got {alignment!r}")
    if alignment == "lower_right" and not is_causal:
        raise ValueError("causal_alignment='lower_right' is for is_causal=True only; leave it at 'upper_left'")
    return alignment == "lower_right"


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    shapes = f"got query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 3 or key.dim() != 3 or value.dim() != 3:
        raise ValueError(f"query, key and value must have the three dimensions (tokens, heads, channels); {shapes}")
    if key.shape[:2] != value.shape[:2]:
        raise ValueError(f"key and value must have the same numbers of tokens and heads; {shapes}")
    if query.shape[2] != key.shape[2] or query.shape[2] < 1:
        raise ValueError(f"query and key must have the same head_dim (last dimension) of at least 1; {shapes}")
    heads, key_heads = query.shape[1], key.shape[1]
    if heads != key_heads and not (enable_gqa and key_heads > 0 and heads % key_heads == 0):
        rule = "key's number of heads must divide query's" if enable_gqa else "the numbers of heads must be equal"
        hint = "" if enable_gqa or key_heads < 1 or heads % key_heads else "; enable_gqa=True would group them"
        raise ValueError(f"{rule}{hint}; {shapes}")


def _boundaries(name: str, given: Any) -> Tensor:
    """Return the boundaries of the sequences as a tensor; their values are checked when they are read."""
    if not isinstance(given, Tensor):
        if not isinstance(given, (list, tuple)):
            raise TypeError(f"{name} must be a tensor or a sequence of integers, got {type(given).__name__}")
        values = [_checks.integer(f"{name}[{i}]", x, 0) for i, x in enumerate(cast("Sequence[Any]", given))]
        given = torch.tensor(values, dtype=torch.int64)
    _checks.check_dense(name, given)
    _checks.check_cpu(name, given)
    if given.dtype not in (torch.int32, torch.int64) or given.dim() != 1 or given.shape[0] < 1:
        raise ValueError(
            f"{name} must be an int32 or int64 tensor of one dimension, [0, ..., number of tokens], got {given.dtype} "
            f"of shape {tuple(given.shape)}"
        )
    return given
