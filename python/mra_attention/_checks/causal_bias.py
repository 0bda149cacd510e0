"""`CausalBias` of torch.nn.attention.bias: causality that says how queries and keys are aligned."""

from __future__ import annotations

from typing import Any

from torch.nn.attention.bias import CausalBias, CausalVariant

from . import numbers


def is_requested(is_causal: Any, attn_mask: Any) -> bool:
    """Return whether a call is causal, and check the two arguments that say so."""
    if is_causal is False:
        return isinstance(attn_mask, CausalBias)
    numbers.check_bool("is_causal", is_causal)
    if isinstance(attn_mask, CausalBias):
        raise ValueError(
            "is_causal=True cannot be used together with an attn_mask that is a CausalBias; pass one of them"
        )
    return True


def is_lower_right(attn_mask: Any, query_length: int, key_length: int) -> bool:
    """Return whether `attn_mask` is a CausalBias that aligns the last query with the last key; check its lengths."""
    if not isinstance(attn_mask, CausalBias):
        return False
    made_for = (getattr(attn_mask, "seq_len_q", None), getattr(attn_mask, "seq_len_kv", None))
    if made_for[0] is None:  # indexing and copying give a CausalBias that does not say what it is
        raise TypeError(
            "attn_mask is a CausalBias that has lost its lengths, as the result of an operation on one; pass what "
            "causal_upper_left or causal_lower_right returned"
        )
    if made_for != (query_length, key_length):
        raise ValueError(
            f"attn_mask is a CausalBias for (query length, key length) = {made_for}, but query and key have "
            f"{(query_length, key_length)}"
        )
    return attn_mask.variant != CausalVariant.UPPER_LEFT
