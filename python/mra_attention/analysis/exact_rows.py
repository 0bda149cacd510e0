"""Exact attention of some queries of a call."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_call import AttentionCall
from .pairs import Pairs


def exact_rows(call: AttentionCall, rows: Tensor, item: int = 0) -> Tensor:
    """Compute the output of exact attention for some queries of a batch item.

    Parameters
    ----------
    call : AttentionCall
        The call; where only some queries were kept, `rows` counts those.
    rows : Tensor
        int64 `(H, R)`: the queries of each head.
    item : int, default 0
        The batch item.

    Returns
    -------
    Tensor
        `(H, R, Dv)`, float64 for float64 inputs and else float32. A query that sees no key has 0.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        If attention would refuse the call, its mask is a BlockMask, or `rows` does not have the shape `(H, R)`.
    IndexError
        If the call has no such item or query.

    Notes
    -----
    Deterministic. It takes `2 H R Lk (D + Dv)` floating point operations and `H R Lk` numbers of memory.
    """
    pairs = Pairs(call)
    batch, heads, held, _ = call.query.shape
    if rows.dim() != 2 or rows.shape[0] != heads or rows.dtype is not torch.int64:
        raise ValueError(f"rows must be int64 ({heads}, R), got {rows.dtype} of the shape {tuple(rows.shape)}")
    if not 0 <= item < batch:
        raise IndexError(f"item must be in 0 .. {batch - 1}, got {item}")
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < held:
        raise IndexError(f"rows must be in 0 .. {held - 1}, got {int(rows.min())} .. {int(rows.max())}")
    return outputs_of_rows(pairs, item, rows)


def outputs_of_rows(pairs: Pairs, item: int, rows: Tensor) -> Tensor:
    """Return the exact outputs of some of the queries that the call has, `(H, R, Dv)`; `rows` is `(H, R)`."""
    call = pairs.call
    precision = torch.promote_types(call.query.dtype, torch.float32)
    every = slice(0, call.query.shape[1])
    logits, visible = logits_of_rows(pairs, item, every, rows, precision)
    value = call.value[item].detach().to(precision)
    in_group = rows.numel() // max(1, value.shape[0])
    if visible is not None and call.attn_mask is not None:  # what nobody sees may hold NaN
        seen = visible.expand_as(logits).reshape(value.shape[0], in_group, value.shape[1]).any(1)
        value = value.masked_fill(~seen[..., None], 0.0)
    weights = softmax_of_rows(logits, pairs.sinks(item, every, precision))
    return (weights.view(value.shape[0], in_group, value.shape[1]) @ value).view(*rows.shape, value.shape[-1])


def logits_of_rows(
    pairs: Pairs, item: int, heads: slice, rows: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return the logits of some queries, `(h, R, Lk)`, -inf where they see nothing, and which keys they see.

    `rows`, `(h, R)`, counts the queries that the call has. The heads are one, or whole groups.
    """
    call = pairs.call
    group = call.query.shape[1] // call.key.shape[1]
    key = call.key[item, heads.start // group : -(-heads.stop // group)].detach().to(dtype)
    query = call.query[item, heads].detach()
    chosen = query.gather(1, rows[..., None].expand(-1, -1, query.shape[-1])).to(dtype)
    # The heads of a group are rows of one product, so that no key is copied.
    in_group = rows.numel() // max(1, key.shape[0])
    logits = (chosen * pairs.scale).reshape(key.shape[0], in_group, key.shape[-1]) @ key.mT
    logits = logits.view(*rows.shape, key.shape[1])
    if pairs.softcap is not None:
        logits = (logits / pairs.softcap).tanh() * pairs.softcap
    visible, bias = pairs.of_rows(item, heads, pairs.queries[rows], dtype)
    if bias is not None:
        logits = logits + bias
    return logits if visible is None else logits.masked_fill(~visible, -torch.inf), visible


def softmax_of_rows(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Return weights, 0 in a row without a key; a sink, `(h,)`, is one more logit."""
    largest = logits.amax(-1, keepdim=True)
    if sinks is not None:
        largest = torch.maximum(largest, sinks[:, None, None])
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    weights = (logits - largest).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks[:, None, None] - largest).exp()
    return weights / total.masked_fill(total == 0.0, 1.0)
