"""What masks, causality, windows and distances say of the pairs of a call, some queries at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import block_mask, calls
from .._checks.arguments import Arguments
from .attention_call import AttentionCall


class Pairs:
    """The bias of every pair of a call: `-inf` where the query does not see the key.

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
        self.queries = query_index(call)
        """int64 `(R,)`: the numbers of the queries that the call has."""
        self.scale = prepared.settings.scale
        self.softcap = prepared.settings.softcap
        self.offset = prepared.inputs.key.shape[2] - int(call.query_length or 0) if prepared.settings.lower_right else 0
        """The position of query 0 among the keys."""
        self._window = prepared.settings.window_left, prepared.settings.window_right
        self._inputs = prepared.inputs

    def sink(self, batch: int, head: int) -> float | None:
        """Return the sink of a head."""
        sinks = self._inputs.sinks
        return None if sinks is None else float(sinks[batch, head].detach())

    def valid_keys(self, batch: int, head: int, chunk: int) -> Tensor | None:
        """Return bool `(Lk,)`: the keys that the mask shows to some query; None if there is no mask."""
        if self._inputs.key_mask is not None:
            return self._inputs.key_mask[batch]
        mask = self._mask(batch, head)
        if mask is None:
            return None
        seen = torch.zeros(self._inputs.key.shape[2], dtype=torch.bool)
        for start in range(0, mask.shape[0], chunk):
            seen |= _shows(mask[start : start + chunk]).any(0)
        return seen

    def bias(self, batch: int, head: int, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the bias of some queries, `(R, Lk)`.

        Parameters
        ----------
        batch, head : int
            Which sequence and which head of query.
        rows : Tensor
            int64 `(R,)`: the numbers of the queries.
        dtype : torch.dtype
            That of the result.
        """
        key_length = self._inputs.key.shape[2]
        ahead = torch.arange(key_length) - (rows[:, None] + self.offset)
        bias = torch.zeros(ahead.shape, dtype=dtype)
        if self._inputs.alibi_slopes is not None:
            bias -= self._inputs.alibi_slopes[batch, head].detach().to(dtype) * ahead.abs()
        mask = self._mask(batch, head)
        if mask is not None:
            some = mask[rows] if mask.shape[0] > 1 else mask
            bias = bias.masked_fill(~some, -math.inf) if some.dtype is torch.bool else bias + some.to(dtype)
        if self._inputs.key_mask is not None:
            bias = bias.masked_fill(~self._inputs.key_mask[batch], -math.inf)
        left, right = self._window
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        if left >= 0:
            hidden |= ahead < -left
        if right >= 0:
            hidden |= ahead > right
        return bias.masked_fill(hidden, -math.inf)

    def _mask(self, batch: int, head: int) -> Tensor | None:
        """Return the mask or bias of a head, `(Lq or 1, Lk or 1)`."""
        mask = self._inputs.attn_bias
        if mask is None:
            return None
        return mask[min(batch, mask.shape[0] - 1), min(head, mask.shape[1] - 1)].detach()


def _shows(mask: Tensor) -> Tensor:
    return mask if mask.dtype is torch.bool else mask != -math.inf


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
        softcap=call.softcap,
        alibi_slopes=None if call.alibi_slopes is None else call.alibi_slopes.detach(),
        sinks=call.sinks,
        causal_alignment=call.causal_alignment,
    )
