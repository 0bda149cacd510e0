"""The masks of calls, told by what they say."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.attention.bias import CausalBias
from torch.nn.attention.flex_attention import create_mask

from .._checks import block_mask, causal_bias, masks
from .._checks.arguments import Arguments
from .visibility import Alignment, Visibility, recognise, without_repeats


class Sight(NamedTuple):
    """What says which keys a query sees; the fields are those of `AttentionCall`."""

    attn_mask: Tensor | None
    is_causal: bool
    window_size: tuple[int, int]
    causal_alignment: Alignment
    query_padding_mask: Tensor | None


class CallMasks:
    """Tells what the masks of calls say; of one that is passed again, as by all layers of a model, but once."""

    def __init__(self) -> None:
        self._last: tuple[Any, Tensor, Visibility] | None = None

    def of_call(self, arguments: Arguments, lead: tuple[int, ...], queries: int, keys: int) -> Sight:
        """Return what a call sees whose logits are `(*lead, queries, keys)`."""
        mask, is_causal = arguments.attn_mask, arguments.is_causal
        window: tuple[int, int] = tuple(arguments.window_size)
        alignment: Alignment = arguments.causal_alignment
        if isinstance(mask, CausalBias):
            is_causal = True
            alignment = "lower_right" if causal_bias.is_lower_right(mask, queries, keys) else "upper_left"
            mask = None
        elif mask is not None:
            seen = self._recognised(_as_pairs(mask, lead, queries, keys), queries, keys)
            mask = seen.attn_mask
            if seen[1:] != Visibility()[1:]:
                if not is_causal and window == (-1, -1):
                    _, is_causal, window, alignment = seen
                else:
                    mask = without_repeats(_as_pairs(arguments.attn_mask, lead, queries, keys)).clone()
        if queries == 1 < keys and not is_causal and window == (-1, -1):
            # A step with a cache, as for replace_sdpa: its query is that of the last key, and sees all.
            is_causal, alignment = True, "lower_right"
        padding = arguments.query_padding_mask
        if padding is not None:
            padding = masks.query_mask(padding, lead, queries).clone()
        return Sight(mask, is_causal, window, alignment, padding)

    def _recognised(self, mask: Tensor, queries: int, keys: int) -> Visibility:
        # While the mask is held, no other one can have its address; its version counts what is written to it.
        version = None if mask.is_inference() else mask._version
        kind = (mask.data_ptr(), mask.shape, mask.stride(), mask.dtype, version, queries, keys)
        if self._last is None or version is None or self._last[0] != kind:
            seen = recognise(mask, queries, keys)
            if seen.attn_mask is not None:
                seen = seen._replace(attn_mask=seen.attn_mask.detach().clone().contiguous())
            self._last = kind, mask, seen
        return self._last[2]


def _as_pairs(mask: Any, lead: tuple[int, ...], queries: int, keys: int) -> Tensor:
    """Return a mask that broadcasts to `(B, H, queries, keys)`."""
    if block_mask.is_block_mask(mask):
        batch, heads = mask.kv_num_blocks.shape[:2]
        return create_mask(mask.mask_mod, batch, heads, queries, keys, device="cpu")
    return masks.four_dimensions(mask.detach(), lead, queries, keys)
