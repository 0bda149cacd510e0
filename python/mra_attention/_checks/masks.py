"""Masks: which ones are accepted, and how they become those of the operators.

`(B, Lk)` and `(B, Lq)` say which tokens are valid; a mask or bias of pairs broadcasts to `(B, H, Lq, Lk)`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._ops.sizes import is_one
from .shapes import Shape, broadcast, text
from .tensors import check_bool_mask, check_cpu, check_dense


def key_mask_or_bias(
    mask: Any, dtype: torch.dtype, lead: Shape, query_length: int, key_length: int
) -> tuple[Tensor | None, Tensor | None]:
    """Check `attn_mask`; return it as a key mask `(B, Lk)` if its shape or storage says so, or else as one of pairs.

    That is for speed alone: a mask of pairs that is the same for every query and every head has the same result.
    """
    _check_kind(mask, dtype)
    shape = mask.shape
    if len(lead) == 2 and shape == (lead[0], 1, 1, key_length) and mask.dtype is torch.bool:
        return mask.view(lead[0], key_length), None
    full = (*lead, query_length, key_length)
    if not 1 <= len(shape) <= len(full) or broadcast([shape, full]) != full:
        raise ValueError(
            "attn_mask must be broadcastable to (..., heads, query length, key length) = "
            f"{text(full)}, got the shape {text(shape)}{_hint(shape, lead, key_length)}"
        )
    if mask.dtype is not torch.bool or not all(_is_same_along(mask, dimension) for dimension in (-2, -3)):
        return None, four_dimensions(mask, lead, query_length, key_length)
    for _ in range(min(len(shape) - 1, 2)):
        if mask.shape[-2] == 0:
            return None, None  # no query or no head, so there is nothing to mask
        mask = mask.select(-2, 0)
    return _flatten_batch(mask, lead, key_length), None


def query_mask(mask: Any, lead: Shape, query_length: int) -> Tensor:
    """Check `query_padding_mask` and bring it to `(B, Lq)`."""
    check_bool_mask("query_padding_mask", mask)
    return of_tokens("query_padding_mask", "query", mask, lead, query_length)


def of_tokens(name: str, side: str, given: Tensor, lead: Shape, length: int) -> Tensor:
    """Check the shape of what there is for each query or key, and bring it to `(B, length)`."""
    shape, full = given.shape, (*lead[:-1], length)
    if len(full) == 2 and shape == full:
        return given
    accepted = full if len(full) > 1 else (1, length)
    if not 1 <= len(shape) <= len(accepted) or shape[-1] != length or broadcast([shape, accepted]) != accepted:
        raise ValueError(
            f"{name} must be broadcastable to (batch, {side} length) = {text(accepted)}, got the shape {text(shape)}"
        )
    return _flatten_batch(given, lead, length)


def _check_kind(mask: Any, dtype: torch.dtype) -> None:
    check_dense("attn_mask", mask)
    if mask.dtype not in (torch.bool, torch.float32, dtype):
        raise TypeError(
            "attn_mask must be a bool tensor (True takes part in attention), or an additive bias of float32 or of the "
            f"dtype of query, {dtype}; got {mask.dtype}"
        )
    check_cpu("attn_mask", mask)


def _is_same_along(mask: Tensor, dimension: int) -> bool:
    return mask.dim() < -dimension or is_one(mask.shape[dimension]) or mask.stride(dimension) == 0


def _hint(shape: Shape, lead: Shape, key_length: int) -> str:
    """Help with the mask that most callers hold: one row for each batch item."""
    if len(lead) == 2 and tuple(shape) == (lead[0], key_length):
        return ". A mask of shape (batch, key length) is passed as mask[:, None, None, :]"
    return ""


def four_dimensions(mask: Tensor, lead: Shape, query_length: int, key_length: int) -> Tensor:
    """Bring a mask or bias that broadcasts to `(*lead, Lq, Lk)` to four dimensions that broadcast to `(B, H, Lq, Lk)`.

    What is repeated is not copied, but with several batch dimensions of which only some are.
    """
    rank = len(lead) + 2
    mask = mask.reshape((1,) * (rank - mask.dim()) + tuple(mask.shape))
    if rank < 4:
        return mask.reshape((1,) * (4 - rank) + tuple(mask.shape))
    batch = mask.shape[: rank - 3]
    if rank > 4:
        if math.prod(batch) > 1:
            mask = mask.expand(*lead[:-1], *mask.shape[rank - 3 :])
        mask = mask.flatten(0, rank - 4)
    return mask


def _flatten_batch(mask: Tensor, lead: Shape, length: int) -> Tensor:
    """Bring a mask that broadcasts to `(*batch, length)`, possibly behind a further 1, to `(B, length)`."""
    batch = lead[:-1]
    return mask.expand(*(batch or (1,)), length).reshape(math.prod(batch), length)
