"""What masks, causality, windows and distances say of the pairs of some queries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import block_mask, calls
from .._checks.arguments import Arguments
from .._ops import Inputs, Settings
from ._valid_tokens import valid_tokens
from .attention_call import AttentionCall


class Pairs:
    """A call of which any pair of query and key may be asked for.

    Arguments are checked as `mra_attention.scaled_dot_product_attention` checks them.

    Parameters
    ----------
    call : AttentionCall
        The call.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        If that function would refuse the arguments, or `query_rows` and `query_length` do not fit `query`.
    """

    def __init__(self, call: AttentionCall) -> None:
        if block_mask.is_block_mask(call.attn_mask):
            raise TypeError(
                f"attn_mask of layer {call.layer!r} must be a tensor, got a BlockMask; "
                "torch.nn.attention.flex_attention.create_mask makes one of its mask_mod"
            )
        if call.query.shape[0] != call.key.shape[0]:
            raise ValueError(
                f"query and key of layer {call.layer!r} must have one batch size, got {call.query.shape[0]} and "
                f"{call.key.shape[0]}"
            )
        prepared = calls.prepare((_all_queries(call), call.key, call.value), _arguments(call))
        self.call = call
        self.queries = query_index(call)
        """int64 `(R,)`: the numbers of the queries that the call has."""
        self.scale = prepared.settings.scale
        self.softcap = prepared.settings.softcap
        self.offset = offset_of(prepared.inputs, prepared.settings)
        """The position of query 0 among the keys."""
        self._inputs, self._settings = prepared.inputs, prepared.settings

    def sinks(self, item: int, heads: slice, dtype: torch.dtype) -> Tensor | None:
        """Return the sinks of some heads of query, `(h,)`."""
        sinks = self._inputs.sinks
        return None if sinks is None else sinks[item, heads].detach().to(dtype)

    def valid(self, item: int) -> tuple[Tensor, Tensor]:
        """Return which of the queries that the call has, and which keys, are not padding, bool `(R,)` and `(Lk,)`."""
        tokens = valid_tokens(self._inputs, item)
        return tokens.queries[self.queries], tokens.keys

    def of_rows(
        self, item: int, heads: slice, queries: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return what `pairs_of_rows` does."""
        return pairs_of_rows(self._inputs, self._settings, item, heads, queries, dtype)


def offset_of(inputs: Inputs, settings: Settings) -> int:
    """Return the position of query 0 among the keys."""
    return inputs.key.shape[2] - inputs.query.shape[2] if settings.lower_right else 0


def pairs_of_rows(
    inputs: Inputs,
    settings: Settings,
    item: int,
    heads: slice,
    queries: Tensor,
    dtype: torch.dtype,
    keys: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return who sees whom, and what is added to logits.

    Parameters
    ----------
    inputs, settings
        Those of the operators.
    item, heads : int and slice
        Which sequence and which heads of query.
    queries : Tensor
        int64 `(h, R)` or `(1, R)`: the queries of each head, or of all.
    dtype : torch.dtype
        That of the bias.
    keys : Tensor, optional
        int64: some keys; by default all.

    Returns
    -------
    tuple of Tensor or None
        bool and a bias, which broadcast to `(h, R, Lk)`; None for all pairs, and for nothing. A bias of a hidden pair
        has no meaning.
    """
    shown: list[Tensor] = []
    bias = None
    window = settings.window_left, settings.window_right
    if window != (-1, -1) or inputs.alibi_slopes is not None:
        columns = torch.arange(inputs.key.shape[2]) if keys is None else keys
        ahead = columns - (queries + offset_of(inputs, settings))[..., None]
        shown += [ahead >= -window[0]] * (window[0] >= 0) + [ahead <= window[1]] * (window[1] >= 0)
        if inputs.alibi_slopes is not None:
            bias = -inputs.alibi_slopes[item, heads, None, None].detach().to(dtype) * ahead.abs()
    if inputs.key_mask is not None:
        shown.append(inputs.key_mask[item] if keys is None else inputs.key_mask[item, keys])
    if inputs.query_mask is not None:
        shown.append(inputs.query_mask[item][queries][..., None])
    if inputs.attn_bias is not None:
        mask = _mask_of_rows(inputs.attn_bias.detach(), item, heads, queries, keys)
        shown.append(mask if mask.dtype is torch.bool else mask > -math.inf)
        if mask.dtype is not torch.bool:
            bias = mask.to(dtype) if bias is None else bias + mask.to(dtype)
    visible = None
    for some in shown:
        visible = some if visible is None else visible & some
    return visible, bias


def _mask_of_rows(mask: Tensor, item: int, heads: slice, queries: Tensor, keys: Tensor | None) -> Tensor:
    """Return the mask or bias of some queries, from one that broadcasts to `(B, H, Lq, Lk)`."""
    mask = mask[item if mask.shape[0] > 1 else 0]
    mask = mask[heads] if mask.shape[0] > 1 else mask
    if keys is not None and mask.shape[2] > 1:
        mask = mask[..., keys]
    if mask.shape[1] == 1:
        return mask
    return mask[torch.arange(mask.shape[0])[:, None], queries]


def query_index(call: AttentionCall) -> Tensor:
    """Return int64 `(R,)`: the numbers of the queries that a call has.

    Raises
    ------
    ValueError
        If `query_rows` and `query_length` do not fit `query`.
    """
    held, rows, length = call.query.shape[-2], call.query_rows, int(call.query_length or 0)
    if rows is None:
        if held != length:
            raise ValueError(
                f"layer {call.layer!r} has {held} queries and query_length={length}; say which they are by query_rows"
            )
        return torch.arange(length)
    ascending = bool((rows[1:] > rows[:-1]).all())
    if tuple(rows.shape) != (held,) or not ascending or (held and not 0 <= int(rows[0]) <= int(rows[-1]) < length):
        raise ValueError(
            f"query_rows of layer {call.layer!r} must be {held} ascending numbers below query_length={length}, one for "
            f"each query, got the shape {tuple(rows.shape)}"
        )
    return rows.to(torch.int64)


def _all_queries(call: AttentionCall) -> Tensor:
    """Return a tensor of the shape that query has with all its rows; only the shape is read."""
    if call.query.dim() != 4:
        raise ValueError(f"query of layer {call.layer!r} must be (B, H, Lq, D), got {tuple(call.query.shape)}")
    batch, heads, _, dim = call.query.shape
    return call.query.new_zeros(()).expand(batch, heads, int(call.query_length or 0), dim)


def _arguments(call: AttentionCall) -> Arguments:
    return Arguments(
        attn_mask=call.attn_mask,
        is_causal=call.is_causal,
        scale=call.scale,
        enable_gqa=call.query.shape[-3] != call.key.shape[-3],
        window_size=call.window_size,
        query_padding_mask=call.query_padding_mask,
        softcap=call.softcap,
        alibi_slopes=None if call.alibi_slopes is None else call.alibi_slopes.detach(),
        sinks=call.sinks,
        causal_alignment=call.causal_alignment,
    )
