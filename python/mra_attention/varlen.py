"""Attention over packed sequences: the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from . import _observers
from ._checks import calls, numbers, packed
from ._checks.arguments import Arguments
from ._ops import forward, forward_out, is_plain
from .config import MRAConfig, MRASettings, Unpack, with_settings


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
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[False] = False,
    config: MRAConfig | None = None,
    **settings: Unpack[MRASettings],
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
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[True],
    config: MRAConfig | None = None,
    **settings: Unpack[MRASettings],
) -> tuple[Tensor, Tensor]: ...


@with_settings
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
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    config: MRAConfig | None = None,
    **settings: Unpack[MRASettings],
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
    dropout_p, is_causal, scale, enable_gqa, window_size, softcap, alibi_slopes, sinks, return_lse
        As in `scaled_dot_product_attention`, for every sequence.
    causal_alignment : {"upper_left", "lower_right"}, default "upper_left"
        With `is_causal=True` or a window, whether the first queries or the last queries of a sequence are beside its
        first keys or its last ones: the position of query `t` among the keys is `t`, or `t + l_k - l_q`. In
        flash-attention it is the latter.
    config : MRAConfig, optional
        How attention is approximated.
    **settings
        Fields of `MRAConfig`, which explains them; they take the place of those of `config`. A `grid` is refused.

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
    Definition: docs/definitions.md, sections 2 to 4. Deterministic, as `scaled_dot_product_attention`. The boundaries
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
    numbers.check_bool("return_lse", return_lse)
    arguments = Arguments(
        dropout_p=dropout_p,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        scale=scale,
        enable_gqa=enable_gqa,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        config=config,
        settings=settings,
    )
    inputs, ready = packed.prepare((query, key, value), (cu_seqlens_q, cu_seqlens_k), arguments)
    _observers.tell((query, key, value), arguments, (cu_seqlens_q, cu_seqlens_k))
    if ready.dropout_p != 0.0:
        inputs = inputs._replace(seed=calls.draw_seed())
    if not return_lse:
        return forward_out(inputs, ready, is_plain(*inputs[:3]))[0].transpose(0, 1)
    out, lse, _ = forward(inputs, ready)
    return out[0].transpose(0, 1), lse[0]
