"""What the mask functions of transformers say of positions, where they are among those that are known.

A mask function of transformers is a closure that answers for one pair. A known one is recognised by its code object and
described by the values in its closure. Any other, one of a later version among them, is not guessed at: its answers are
read pair by pair.
"""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# transformers is partly without annotations.

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

MaskFunction = Callable[..., Any]


class Pattern(NamedTuple):
    """Which keys a query sees, by their positions."""

    is_causal: bool
    window_size: tuple[int, int] = (-1, -1)
    documents: Tensor | None = None
    """`(B, L)`: tokens see those with the same number only, which lie side by side."""


def recognise(mask_function: MaskFunction) -> Pattern | None:
    """Return the pattern that a mask function describes, or None if it is not a known one."""
    if mask_function is masking_utils.causal_mask_function:
        return Pattern(is_causal=True)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Pattern(is_causal=False)
    parts: Any = _closure(mask_function, _AND).get("mask_functions")
    if parts is None or len(parts) != 2:
        return None
    overlay, base = parts
    if base is masking_utils.causal_mask_function:
        return _causal_window(overlay)
    if base is masking_utils.bidirectional_mask_function:
        return _bidirectional_window(overlay)
    return _packed(*parts)


def _causal_window(overlay: MaskFunction) -> Pattern | None:
    size = _closure(overlay, _WINDOW).get("sliding_window")
    return None if not isinstance(size, int) or size < 1 else Pattern(True, (size - 1, 0))


def _bidirectional_window(overlay: MaskFunction) -> Pattern | None:
    size = _closure(overlay, _TWO_SIDED_WINDOW).get("sliding_window")
    return None if not isinstance(size, int) or size < 0 else Pattern(False, (size, size))


def _packed(remapped: MaskFunction, same_document: MaskFunction) -> Pattern | None:
    """Return the pattern of packed sequences, in each of which positions rise by one: their order is that of tokens."""
    inner = _closure(remapped, _REMAP).get("mask_function")
    documents = _closure(same_document, _PACKED).get("packed_sequence_mask")
    if inner is None or not isinstance(documents, Tensor):
        return None
    pattern = recognise(inner)
    return None if pattern is None or pattern.documents is not None else pattern._replace(documents=documents)


def _closure(function: MaskFunction, model: MaskFunction) -> dict[str, Any]:
    """Return the values in the closure of a function, if its code is that of `model`."""
    if not inspect.isfunction(function) or function.__code__ is not model.__code__:
        return {}
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


_NO_TOKENS = torch.zeros((1, 0), dtype=torch.int64, device="cpu")
_AND = masking_utils.and_masks()
_WINDOW = masking_utils.sliding_window_overlay(1)
_TWO_SIDED_WINDOW = masking_utils.sliding_window_bidirectional_overlay(1)
_REMAP = masking_utils.remap_positions_for_packed_sequence(masking_utils.causal_mask_function, _NO_TOKENS)
_PACKED = masking_utils.packed_sequence_mask_function(_NO_TOKENS)
