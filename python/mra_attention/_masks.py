"""Masks: which ones are accepted, and how they become the `(B, Lk)` and `(B, Lq)` masks of the operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._checks import check_bool_mask
from ._shapes import Shape, broadcast, text

_SUPPORTED = "now: a key padding mask, bool, True = may be attended to, broadcastable to (batch, 1, 1, key length)"


def key_mask(mask: Any, lead: Shape, query_length: int, key_length: int) -> Tensor | None:
    """Check `attn_mask`, which may only remove keys, and bring it to `(B, Lk)`."""
    _check_kind(mask)
    shape = mask.shape
    if len(lead) == 2 and shape == (lead[0], 1, 1, key_length):
        return mask.view(lead[0], key_length)
    full = (*lead, query_length, key_length)
    if not 1 <= len(shape) <= len(full) or broadcast([shape, full]) != full:
        raise ValueError(
            "attn_mask must be broadcastable to (..., heads, query length, key length) = "
            f"{text(full)}, got the shape {text(shape)}{_hint(shape, lead, key_length)}"
        )
    for dimension, what in ((-2, "query"), (-3, "head")):
        if len(shape) >= -dimension and shape[dimension] > 1 and mask.stride(dimension) != 0:
            raise NotImplementedError(
                f"attn_mask of shape {text(shape)} is not the same for every {what} (dimension {dimension}): such "
                f"masks are for later; {_SUPPORTED}{_hint(shape, lead, key_length)}"
            )
    for _ in range(min(len(shape) - 1, 2)):
        if mask.shape[-2] == 0:
            return None  # no query or no head, so there is nothing to mask
        mask = mask.select(-2, 0)
    return _flatten_batch(mask, lead, key_length)


def query_mask(mask: Any, lead: Shape, query_length: int) -> Tensor:
    """Check `query_padding_mask` and bring it to `(B, Lq)`."""
    check_bool_mask("query_padding_mask", mask)
    shape, full = mask.shape, (*lead[:-1], query_length)
    if len(full) == 2 and shape == full:
        return mask
    accepted = full if len(full) > 1 else (1, query_length)
    if not 1 <= len(shape) <= len(accepted) or shape[-1] != query_length or broadcast([shape, accepted]) != accepted:
        raise ValueError(
            "query_padding_mask must be broadcastable to (batch, query length) = "
            f"{text(accepted)}, got the shape {text(shape)}"
        )
    return _flatten_batch(mask, lead, query_length)


def _check_kind(mask: Any) -> None:
    if type(mask) is Tensor and mask.dtype is torch.bool:
        check_bool_mask("attn_mask", mask)
        return
    if isinstance(mask, Tensor) and mask.is_floating_point():
        raise NotImplementedError(f"attn_mask is additive ({mask.dtype}): such masks are for later; {_SUPPORTED}")
    check_bool_mask("attn_mask", mask)


def _hint(shape: Shape, lead: Shape, key_length: int) -> str:
    """Help with the mask that most callers hold: one row for each batch item."""
    if len(lead) == 2 and tuple(shape) == (lead[0], key_length):
        return ". A mask of shape (batch, key length) is passed as mask[:, None, None, :]"
    return ""


def _flatten_batch(mask: Tensor, lead: Shape, length: int) -> Tensor:
    """Bring a mask that broadcasts to `(*batch, length)`, possibly behind a further 1, to `(B, length)`."""
    batch = lead[:-1]
    return mask.expand(*(batch or (1,)), length).reshape(math.prod(batch), length)
