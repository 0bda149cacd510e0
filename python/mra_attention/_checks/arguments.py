"""The arguments of the public functions beside query, key and value, as they were given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Arguments(NamedTuple):
    """What a caller gave; what a function does not take has its default."""

    attn_mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False
    window_size: Any = (-1, -1)
    query_padding_mask: Any = None
    plan: Any = None
    softcap: Any = None
    alibi_slopes: Any = None
    sinks: Any = None
    causal_alignment: Any = "upper_left"
    query_order: Any = None
    key_order: Any = None
    config: Any = None
    settings: Mapping[str, Any] = {}
