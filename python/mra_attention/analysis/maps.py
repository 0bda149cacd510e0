"""The exact attention of a call, some rows of its matrix at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_call import AttentionCall
from .exact_rows import logits_of_rows, softmax_of_rows
from .pairs import Pairs, query_index

__all__ = ["Rows", "attention_map", "logits", "rows", "take_queries"]


CHUNK = 256
"""How many queries at a time."""


class Rows(NamedTuple):
    """Some rows of an attention matrix."""

    queries: Tensor
    """int64 `(R,)`: the numbers of the queries."""
    values: Tensor
    """`(R, Lk)`: the weights, or the logits."""
    visible: Tensor
    """bool `(R, Lk)`: which keys the queries see."""


def logits(
    call: AttentionCall, batch: int, head: int, *, chunk: int = CHUNK, dtype: torch.dtype = torch.float64
) -> Iterator[Rows]:
    """Yield the logits of exact attention, `chunk` queries at a time.

    Parameters
    ----------
    call : AttentionCall
        The call. Its masks, causality, window, scale, softcap and slopes count as in
        `mra_attention.scaled_dot_product_attention`; with `query_rows`, the queries that were kept are computed.
    batch, head : int
        Which sequence and which head of query.
    chunk : int, default 256
        How many queries at a time; memory is proportional to `chunk * Lk`.
    dtype : torch.dtype, default torch.float64
        torch.float64 or torch.float32: in which to compute.

    Yields
    ------
    Rows
        The logits; `-inf` where the query does not see the key. Sinks are not among them.

    Raises
    ------
    IndexError
        If the call has no such sequence or head.
    TypeError, ValueError, NotImplementedError
        If an argument is not accepted, or attention would refuse the call.

    Notes
    -----
    The same numbers on every run. What is stored at hidden keys, NaN too, reaches no row. No gradient is recorded.
    """
    pairs = _pairs(call, batch, head, chunk, dtype)
    return _logits(pairs, batch, head, _all_places(pairs), chunk, dtype)


def rows(
    call: AttentionCall, batch: int, head: int, *, chunk: int = CHUNK, dtype: torch.dtype = torch.float64
) -> Iterator[Rows]:
    """Yield the weights of exact attention, `chunk` queries at a time.

    A row sums to 1, with sinks to less; that of a query that sees no key is 0. See `logits` for the parameters, errors
    and determinism.
    """
    pairs = _pairs(call, batch, head, chunk, dtype)
    return weights_of_rows(pairs, batch, head, _all_places(pairs), chunk, dtype)


def attention_map(
    call: AttentionCall, batch: int, head: int, *, chunk: int = CHUNK, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return the weights of all queries that the call has, `(R, Lk)`; see `rows`."""
    parts = [some.values for some in rows(call, batch, head, chunk=chunk, dtype=dtype)]
    return torch.cat(parts) if parts else torch.zeros(0, call.key.shape[-2], dtype=dtype)


def take_queries(call: AttentionCall, chosen: Tensor) -> AttentionCall:
    """Return the call with some of its queries only.

    Parameters
    ----------
    call : AttentionCall
        The call.
    chosen : Tensor
        int64 `(R,)`, ascending: the numbers of the queries to keep.

    Raises
    ------
    ValueError
        If the call lacks one of them.
    """
    held = query_index(call)
    places = torch.searchsorted(held, chosen)
    missing = places >= held.shape[0]
    missing[~missing] = held[places[~missing]] != chosen[~missing]
    if bool(missing.any()):
        raise ValueError(f"layer {call.layer!r} lacks the query {int(chosen[missing][0])}")
    return replace(call, query=call.query[..., places, :], query_rows=chosen, query_length=call.query_length)


def weights_of_rows(
    pairs: Pairs, batch: int, head: int, places: Tensor, chunk: int, dtype: torch.dtype
) -> Iterator[Rows]:
    """Yield the weights of some of the queries that the call has, by their places among these."""
    sinks = pairs.sinks(batch, slice(head, head + 1), dtype)
    for some in _logits(pairs, batch, head, places, chunk, dtype):
        yield some._replace(values=softmax_of_rows(some.values[None], sinks)[0])


def _logits(pairs: Pairs, batch: int, head: int, places: Tensor, chunk: int, dtype: torch.dtype) -> Iterator[Rows]:
    for start in range(0, places.shape[0], chunk):
        some = places[start : start + chunk]
        values, visible = logits_of_rows(pairs, batch, slice(head, head + 1), some[None], dtype)
        seen = torch.ones((), dtype=torch.bool) if visible is None else visible
        yield Rows(pairs.queries[some], values[0], seen.expand_as(values)[0])


def _pairs(call: AttentionCall, batch: int, head: int, chunk: int, dtype: torch.dtype) -> Pairs:
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    pairs = Pairs(call)
    for name, given, size in (("batch", batch, call.query.shape[0]), ("head", head, call.query.shape[1])):
        if not 0 <= given < size:
            raise IndexError(f"{name} must be in 0 .. {size - 1} for layer {call.layer!r}, got {given}")
    return pairs


def _all_places(pairs: Pairs) -> Tensor:
    return torch.arange(pairs.queries.shape[0])
