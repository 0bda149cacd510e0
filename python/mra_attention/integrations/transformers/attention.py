"""The attention function: what the layers of transformers call."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...functional import scaled_dot_product_attention
from ...varlen import varlen_attention
from . import arguments, settings
from .masks import PatternMask


@dataclass(frozen=True)
class Registered:
    """What `register` was given."""

    defaults: settings.Defaults
    ignored: Collection[str]


class Sight(NamedTuple):
    """What the queries of a layer see."""

    attn_mask: Any = None
    is_causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    lower_right: bool = False
    """Whether the last query is beside the last key."""
    keys: int | None = None
    """How many keys count, the first ones; None for all."""
    pool_queries: bool = True
    """False where a token of a decoder would else learn from later ones, of which averages of queries know."""
    boundaries: tuple[Tensor, Tensor] | None = None
    """Those of packed queries and keys."""


def attend(
    registered: Registered,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return `(B, Lq, H, Dv)` and None in place of the weights.

    With `registered` bound it has the signature of the attention functions of transformers: query `(B, H, Lq, D)`, key
    `(B, Hk, Lk, D)`, value `(B, Hk, Lk, Dv)`. What the mask says decides who sees whom. Where a model makes no mask,
    `is_causal` or else the attribute of that name of the layer decides, as for "sdpa".
    """
    arguments.check(others, registered.ignored)
    lengths = (query.shape[2], key.shape[2])
    sight = _of_mask(attention_mask, lengths, others.get("position_ids")) or _without_pattern(
        attention_mask, lengths, getattr(module, "is_causal", True) if is_causal is None else is_causal, sliding_window
    )
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        sight = _packed(sight, query, cu_seq_lens_q, cu_seq_lens_k)
    if position_bias is not None:
        sight = _with_bias(sight, position_bias, attention_mask)
    is_sliding = sight.window_size != (-1, -1) or (sliding_window is not None and not _is_pattern(attention_mask))
    layer = getattr(module, "layer_idx", None)
    config = settings.of_layer(getattr(module, "config", None), layer, is_sliding, registered.defaults)
    if not (sight.pool_queries and _is_of_encoder(module, lengths, others)):
        config = replace(config, pool_queries=False)
    if sight.keys is not None:
        key, value = key[:, :, : sight.keys], value[:, :, : sight.keys]
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": key.shape[1] != query.shape[1], "config": config}
    options |= {name: x for name, x in (("softcap", softcap), ("sinks", s_aux)) if x is not None}
    return _call(query, key, value, sight, options), None


def _call(query: Tensor, key: Tensor, value: Tensor, sight: Sight, options: dict[str, Any]) -> Tensor:
    options |= {"is_causal": sight.is_causal, "window_size": sight.window_size}
    if sight.boundaries is not None:
        packed = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
        attention: Any = varlen_attention  # whose overloads cannot be told apart by a dictionary
        alignment = "lower_right" if sight.is_causal or sight.window_size != (-1, -1) else "upper_left"
        out: Tensor = attention(*packed, *sight.boundaries, causal_alignment=alignment, **options)
        return out.reshape(query.shape[0], query.shape[2], *out.shape[1:])
    alignment = "lower_right" if sight.lower_right else "upper_left"
    attention = scaled_dot_product_attention
    out = attention(query, key, value, sight.attn_mask, causal_alignment=alignment, **options)
    return out.transpose(1, 2).contiguous()


def _is_pattern(mask: Any) -> bool:
    return isinstance(mask, PatternMask)


def _is_of_encoder(module: torch.nn.Module, lengths: tuple[int, int], others: Mapping[str, Any]) -> bool:
    """Whether a layer is known to be self-attention of an encoder, whose queries may be averaged.

    In cross-attention of a decoder a token would learn from later ones that way. transformers has no one way to say
    what a layer is, so that is assumed of every layer that may be one.
    """
    is_cross = getattr(module, "is_cross_attention", False) or "CrossAttention" in type(module).__name__
    if is_cross or lengths[0] != lengths[1] or others.get("encoder_hidden_states") is not None:
        return False
    is_decoder = getattr(module, "is_decoder", None)
    if is_decoder is not None:
        return not is_decoder
    config = getattr(module, "config", None)
    decodes = ("is_decoder", "is_encoder_decoder", "add_cross_attention")
    return not any(getattr(config, name, False) for name in decodes)


def _of_mask(mask: Any, lengths: tuple[int, int], positions: Any) -> Sight | None:
    """Return what our own mask says."""
    if not isinstance(mask, PatternMask):
        return None
    if tuple(mask.shape[2:]) != lengths:
        raise ValueError(
            f"attention_mask is for (query length, key length) = {tuple(mask.shape[2:])}, but query and key have "
            f"{lengths}"
        )
    is_pattern_causal, window_size, _ = mask.pattern
    documents = mask.documents(positions)
    return Sight(
        attn_mask=None if mask.padding is None else mask.padding[:, None, None, :],
        is_causal=is_pattern_causal,
        window_size=window_size,
        lower_right=lengths[0] != mask.keys and is_pattern_causal,
        keys=None if mask.keys == lengths[1] else mask.keys,
        boundaries=None if documents is None else _boundaries(documents),
    )


def _boundaries(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Return where documents begin and end in the flattened batch, whose items are cut from each other too."""
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    total = torch.tensor([documents.numel()], device="cpu")
    boundaries = torch.cat([first.flatten().nonzero()[:, 0], total])
    return boundaries, boundaries


def _without_pattern(mask: Any, lengths: tuple[int, int], is_causal: bool, sliding_window: int | None) -> Sight:
    """Return what a mask of pairs says, or what is meant where there is none: the rules of "sdpa"."""
    queries, keys = lengths
    if mask is not None:
        return Sight(mask, lower_right=is_causal and queries < keys, pool_queries=not is_causal)
    if sliding_window is not None and sliding_window <= keys:
        raise NotImplementedError(
            f"sliding_window={sliding_window} with attention_mask=None: nothing says whether the model means a window; "
            "use attn_implementation='sdpa'"
        )
    if not is_causal:
        return Sight()
    if queries == 1:
        return Sight(is_causal=True, lower_right=True)
    return Sight(is_causal=True, keys=queries if queries < keys else None)  # the first tokens of a static cache


def _packed(sight: Sight, query: Tensor, cu_seq_lens_q: Any, cu_seq_lens_k: Any) -> Sight:
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be given together")
    if query.shape[0] != 1 or sight.attn_mask is not None or sight.keys is not None:
        raise NotImplementedError(
            "cu_seq_lens_q and cu_seq_lens_k are for packed sequences in a batch of one without padding, mask or "
            f"static cache; got a batch of {query.shape[0]}; pass position_ids that begin anew with every sequence"
        )
    return sight._replace(boundaries=(cu_seq_lens_q, cu_seq_lens_k), lower_right=False)


def _with_bias(sight: Sight, bias: Tensor, mask: Any) -> Sight:
    """Put a bias in the place of the mask; what that hid, the bias hides as well."""
    if sight.boundaries is not None:
        if not isinstance(mask, PatternMask) or mask.pattern.documents is None:
            raise NotImplementedError(
                "position_bias with packed sequences of which the mask function was not told: pad the sequences instead"
            )
        sight = Sight(mask.elements())
    bias = bias if sight.keys is None else bias[..., : sight.keys]
    if sight.attn_mask is None:
        return sight._replace(attn_mask=bias)
    if sight.attn_mask.dtype is torch.bool:
        return sight._replace(attn_mask=bias.masked_fill(~sight.attn_mask, -torch.inf))
    return sight._replace(attn_mask=bias + sight.attn_mask)
