"""Which arguments models hand to their attention: what changes the result is supported or refused."""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# transformers is partly without annotations.

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from transformers.utils import output_capturing

HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",  # the result always is
        "encoder_attention_mask",  # arrives as attention_mask of the cross-attention
        "encoder_hidden_states",
        "labels",
        "logits_to_keep",
        "max_length_k",  # follows from cu_seq_lens_k
        "max_length_q",
        "mm_token_type_ids",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",  # rotations have been applied; packed sequences are in the mask
        "return_dict",
        "seq_idx",
        "token_type_ids",
        "use_cache",
    }
)
"""What models hand through to every layer, and what attention with a mask does not depend on."""


def check(arguments: Mapping[str, Any], ignored: Collection[str]) -> None:
    """Refuse arguments that attention does not know, and the weights of attention if somebody wants them."""
    if arguments.get("output_attentions") or _weights_are_recorded():
        raise NotImplementedError(
            "output_attentions=True: MRA attention never has the matrix of weights; load the model with "
            "attn_implementation='eager', or call model.set_attn_implementation('eager'), to look at weights"
        )
    for name, value in arguments.items():
        if value is None or value is False or name in HARMLESS or name in ignored:
            continue
        raise NotImplementedError(
            f"{name}={_brief(value)}: attention with attn_implementation='mra' does not know this argument; use "
            f"attn_implementation='sdpa' or 'eager', or register(ignored_arguments=[{name!r}]) if it does not change "
            "attention"
        )


def _weights_are_recorded() -> bool:
    """Whether the forward pass collects weights: it records what layers return, and does not tell the layers."""
    collector: Any = getattr(output_capturing, "_active_collector", None)
    collected = None if collector is None else collector.get()
    return bool(collected) and any(name.endswith("attentions") for name in collected)


def _brief(value: Any) -> str:
    return type(value).__name__ if hasattr(value, "shape") else repr(value)[:80]
