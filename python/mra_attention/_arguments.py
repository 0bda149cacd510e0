"""Arguments that the public functions share, checked and brought to the form that the operators take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from . import _checks, _masks, _shapes
from ._autocast import autocast

Masks: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
_NO_MASKS: Masks = (None, None, None)


def selection(
    resolutions: Sequence[int],
    blocks_per_row: float,
    num_blocks: int | None,
    first_blocks: int,
    diagonal_blocks: int,
) -> tuple[int, tuple[float, int | None, int, int]]:
    """Check what the selection depends on besides the inputs; return the block size and the rest."""
    return _checks.block_size(resolutions), (
        _checks.positive_float("blocks_per_row", blocks_per_row),
        None if num_blocks is None else _checks.integer("num_blocks", num_blocks, 1),
        _checks.integer("first_blocks", first_blocks, 0),
        _checks.integer("diagonal_blocks", diagonal_blocks, 0),
    )


def arrange(
    inputs: tuple[Tensor, ...],
    attn_mask: Tensor | None,
    enable_gqa: bool,
    query_padding_mask: Tensor | None,
) -> tuple[tuple[Tensor, ...], _shapes.Shape | None, Masks]:
    """Check inputs and masks; return the inputs in four dimensions, `lead`, and the masks."""
    if torch.is_autocast_enabled("cpu"):
        inputs = autocast(inputs)
        if attn_mask is not None:
            (attn_mask,) = autocast((attn_mask,))
    _checks.check_inputs(*inputs)
    _checks.check_bool("enable_gqa", enable_gqa)
    inputs, lead = _shapes.arrange(inputs, enable_gqa)
    masks = _NO_MASKS
    if attn_mask is not None or query_padding_mask is not None:
        query_length, key_length = inputs[0].shape[2], inputs[1].shape[2]
        lead_or_default = tuple(inputs[0].shape[:2]) if lead is None else lead
        key_mask = query_mask = attn_bias = None
        if attn_mask is not None:
            key_mask, attn_bias = _masks.key_mask_or_bias(
                attn_mask, inputs[0].dtype, lead_or_default, query_length, key_length
            )
        if query_padding_mask is not None:
            query_mask = _masks.query_mask(query_padding_mask, lead_or_default, query_length)
        masks = (key_mask, query_mask, attn_bias)
    return inputs, lead, masks
