"""The masks of torch.nn.MultiheadAttention, in which True hides a key, as one for attention, in which True shows it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def combine(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    shape: tuple[int, int, int, int],
    added: int,
    dtype: torch.dtype,
) -> tuple[Tensor | None, bool]:
    """Return `attn_mask` and `is_causal` for scaled_dot_product_attention.

    No mask of pairs is made where key padding and causality say everything.

    Parameters
    ----------
    attn_mask : Tensor, optional
        `(Lq, Lk)` or `(B * H, Lq, Lk)`, bool or added to the logits. Taken for the causal mask if `is_causal`.
    key_padding_mask : Tensor, optional
        `(B, Lk)`, bool or added to the logits.
    is_causal : bool
        Whether query `t` sees the keys up to `t` only.
    shape : tuple of int
        `(B, H, Lq, Lk)`, without the keys that a module adds.
    added : int
        The number of those keys.
    dtype : torch.dtype
        That of biases made of bool masks.
    """
    # With padding, torch takes the mask as it is, which shows the added keys; without it, the causal form hides them.
    causal = is_causal and (key_padding_mask is None or added == 0)
    if is_causal and not causal and attn_mask is None:
        raise ValueError(
            "is_causal=True with key_padding_mask and with added keys (add_bias_kv, add_zero_attn) needs the mask "
            "itself; pass attn_mask, too"
        )
    pairs = None if causal or attn_mask is None else _shown(_pairs(attn_mask, shape), added)
    padding = None if key_padding_mask is None else _shown(_padding(key_padding_mask, shape), added)
    if pairs is None or padding is None:
        return (padding if pairs is None else pairs), causal
    if pairs.dtype is padding.dtype is torch.bool:
        return pairs & padding, causal
    return _bias(pairs, dtype) + _bias(padding, dtype), causal


def _pairs(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    batch, heads, queries, keys = shape
    if mask.shape == (queries, keys):
        return mask
    if mask.shape == (batch * heads, queries, keys):
        return mask.view(shape)
    raise ValueError(
        f"attn_mask must have the shape {(queries, keys)} or {(batch * heads, queries, keys)}, got {tuple(mask.shape)}"
    )


def _padding(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    batch, _, _, keys = shape
    if mask.shape != (batch, keys):
        raise ValueError(f"key_padding_mask must have the shape {(batch, keys)}, got {tuple(mask.shape)}")
    return mask[:, None, None, :]


def _shown(mask: Tensor, added: int) -> Tensor:
    """Invert a bool mask, and show the added keys."""
    mask = F.pad(mask, (0, added)) if added else mask
    return ~mask if mask.dtype is torch.bool else mask


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
