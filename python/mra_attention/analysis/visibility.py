"""What a mask of pairs says, in fewer words where that is certain: padding, causality, a window."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Alignment = Literal["upper_left", "lower_right"]


class Visibility(NamedTuple):
    """Which keys a query sees; the fields are those of `AttentionCall`."""

    attn_mask: Tensor | None = None
    is_causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    causal_alignment: Alignment = "upper_left"


def recognise(mask: Tensor, query_length: int, key_length: int) -> Visibility:
    """Return what a mask says that broadcasts to `(B, H, Lq, Lk)`, bool or added to the logits.

    A mask that is padding, causality, a window, or these together, is told by its values. Any other mask is returned as
    it is, without what is repeated.
    """
    mask = _without_repeats(mask)
    visible = _as_bool(mask)
    if visible is None or visible.shape[2] not in (1, query_length) or visible.shape[3] != key_length:
        return Visibility(mask)
    if not torch.equal(visible, visible[:, :1].expand_as(visible)):
        return Visibility(mask)
    mask, pairs = mask[:, :1], visible[:, 0]
    valid = pairs.any(1)
    if torch.equal(pairs, valid[:, None].expand_as(pairs)):
        return Visibility(_as_padding(valid))
    # What a band hides from all queries, as the keys behind the last one, is no padding.
    return next(_bands(pairs, [torch.ones_like(valid), valid]), Visibility(mask))


def _as_padding(valid: Tensor) -> Tensor | None:
    return None if bool(valid.all()) else valid[:, None, None, :]


def _without_repeats(mask: Tensor) -> Tensor:
    for dim, stride in enumerate(mask.stride()):
        if stride == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _as_bool(mask: Tensor) -> Tensor | None:
    """Return which pairs are visible, or None if the mask is a bias that does more than hide."""
    if mask.dtype is torch.bool:
        return mask
    visible, lowest = mask == 0, mask == torch.finfo(mask.dtype).min
    if not bool((visible | lowest | (mask == -torch.inf)).all()):
        return None
    # The lowest number hides a key beside others, but a query that sees no other key sees those.
    return None if bool(lowest.any()) and not bool(visible.any(-1).all()) else visible


def _bands(pairs: Tensor, keys_shown: list[Tensor]) -> Iterator[Visibility]:
    """Yield the causality and windows that show some valid keys, `(B, Lk)` each, as `pairs` `(B, Lq, Lk)` does."""
    queries, keys = pairs.shape[1:]
    sees, seen = pairs.any(-1), pairs.sum(-1, dtype=torch.int32)
    first = pairs.to(torch.uint8).argmax(-1)
    last = keys - 1 - pairs.flip(-1).to(torch.uint8).argmax(-1)
    alignments: list[tuple[Alignment, int]] = [("upper_left", 0)]
    if queries != keys:
        alignments.insert(0, ("lower_right", keys - queries))
    for valid, (alignment, offset) in itertools.product(keys_shown, alignments):
        before = F.pad(valid.cumsum(-1, dtype=torch.int32), (1, 0))
        places = torch.arange(queries) + offset
        left, right = int((places - first)[sees].max()), int((last - places)[sees].max())
        is_causal = right == 0
        # Without causality, positions are those of the keys only where there are as many queries.
        if not (is_causal or queries == keys):
            continue
        for window in [(a, b) for b in ((0,) if is_causal else (-1, right)) for a in (-1, left)]:
            low = torch.zeros_like(places) if window[0] < 0 else (places - window[0]).clamp(0, keys)
            high = torch.full_like(places, keys) if window[1] < 0 else (places + window[1] + 1).clamp(0, keys)
            # No visible pair is outside, so equal numbers are equal pairs. Bands beside the diagonal have others.
            if torch.equal(before[:, high] - before[:, low], seen):
                window = (-1, -1) if window == (-1, 0) else window
                yield Visibility(_as_padding(valid), is_causal, window, alignment)
