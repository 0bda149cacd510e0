"""Exact attention of some queries of a call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from .attention_call import AttentionCall


def check_call(call: AttentionCall) -> None:
    """Check what the functions of errors take for granted of a call."""
    for name in ("query", "key", "value"):
        tensor = getattr(call, name)
        if tensor.dim() != 4:
            raise ValueError(
                f"call.{name} must have the 4 dimensions (B, H, L, D), got the shape {tuple(tensor.shape)}"
            )
    mask = call.attn_mask
    if isinstance(mask, CausalBias) or not (mask is None or isinstance(mask, Tensor)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise NotImplementedError(
            f"call.attn_mask={type(mask).__name__} is not implemented here; a causal bias is is_causal=True with "
            "causal_alignment, and any other mask a bool tensor"
        )


def four_dimensions(mask: Tensor) -> Tensor:
    """Return a mask that broadcasts to `(B, H, Lq, Lk)` with its 4 dimensions."""
    return mask[(None,) * (4 - mask.dim())]


def exact_rows(call: AttentionCall, rows: Tensor, item: int = 0) -> Tensor:
    """Compute attention exactly for some queries of a batch item.

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
    ValueError
        If query, key or value does not have 4 dimensions.
    NotImplementedError
        If `call.attn_mask` is a causal bias or no tensor.

    Notes
    -----
    Deterministic. It takes `2 H R Lk (D + Dv)` floating point operations and `H R Lk` numbers of memory.
    """
    check_call(call)
    precision = torch.promote_types(call.query.dtype, torch.float32)
    query, key, value = (x[item].detach().to(precision) for x in (call.query, call.key, call.value))
    (heads, count), groups = rows.shape, key.shape[0]
    chosen = query.gather(1, rows[..., None].expand(-1, -1, query.shape[-1]))
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    # The heads of a group are rows of one product, so that no key is copied.
    logits = (chosen * scale).reshape(groups, -1, query.shape[-1]) @ key.transpose(-1, -2)
    logits = logits.view(heads, count, key.shape[1])
    if call.softcap:
        logits = (logits / call.softcap).tanh() * call.softcap
    visible, bias = _of_rows(call, rows, item)
    if bias is not None:
        logits = logits + bias
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
        if call.attn_mask is not None:  # what nobody sees may hold NaN
            seen = visible.expand_as(logits).reshape(groups, -1, key.shape[1]).any(1)
            value = value.masked_fill(~seen[..., None], 0.0)
    weights = _softmax(logits, None if call.sinks is None else call.sinks.detach().to(precision))
    return (weights.view(groups, -1, key.shape[1]) @ value).view(heads, count, -1)


def _softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the weights, 0 in a row without a key; a sink, `(H,)`, is one more logit."""
    largest = logits.amax(-1, keepdim=True)
    if sinks is not None:
        largest = torch.maximum(largest, sinks[:, None, None])
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    weights = (logits - largest).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks[:, None, None] - largest).exp()
    return weights / total.masked_fill(total == 0.0, 1.0)


def _of_rows(call: AttentionCall, rows: Tensor, item: int) -> tuple[Tensor | None, Tensor | None]:
    """Return who sees whom, and what is added to the logits; both broadcast to `(H, R, Lk)`."""
    queries = rows if call.query_rows is None else call.query_rows[rows]
    length = call.key.shape[-2]
    visible = bias = None
    if call.is_causal or call.window_size != (-1, -1) or call.alibi_slopes is not None:
        offset = length - (call.query_length or 0) if call.causal_alignment == "lower_right" else 0
        ahead = torch.arange(length) - (queries + offset)[..., None]
        visible = _interval(call, ahead)
        if call.alibi_slopes is not None:
            bias = -call.alibi_slopes[:, None, None] * ahead.abs()
    if call.attn_mask is None:
        return visible, bias
    mask = _mask_of_rows(call.attn_mask, queries, item)
    allowed = mask if mask.dtype is torch.bool else mask > -torch.inf
    visible = allowed if visible is None else visible & allowed
    if mask.dtype is not torch.bool:
        bias = mask if bias is None else bias + mask
    return visible, bias


def _interval(call: AttentionCall, ahead: Tensor) -> Tensor | None:
    """Return what causality and the window let a query see of keys that lie so far ahead of it."""
    left, right = call.window_size
    right = 0 if call.is_causal else right
    limits = [ahead >= -left] * (left >= 0) + [ahead <= right] * (right >= 0)
    return torch.stack(limits).all(0) if limits else None


def _mask_of_rows(mask: Tensor, queries: Tensor, item: int) -> Tensor:
    mask = four_dimensions(mask.detach())
    mask = mask[item if mask.shape[0] > 1 else 0]
    if mask.shape[1] == 1:
        return mask
    heads = torch.arange(queries.shape[0])[:, None] if mask.shape[0] > 1 else torch.zeros_like(queries[:, :1])
    return mask[heads, queries]
