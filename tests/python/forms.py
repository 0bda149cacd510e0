"""Every way in which a call can say who sees whom: the table that drives the tests of definitions, bits and layouts.

A form is made for a shape (B, H, Lq, Lk) and gives settings. `FORMS` has them all; `TOKEN_FORMS` those that hide a pair
of a valid query and a valid key (or ask for it with `pool_queries=False`), so that every token chooses for itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle_geometry import Settings
from torch import Tensor

Shape = tuple[int, int, int, int]
DOCUMENT = 13


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distance(shape: Shape) -> Tensor:
    """(Lq, Lk): how far a query lies behind a key."""
    return torch.arange(shape[2])[:, None] - torch.arange(shape[3])


def documents(shape: Shape) -> Tensor:
    return torch.arange(shape[2])[:, None] // DOCUMENT == torch.arange(shape[3]) // DOCUMENT


def normal(shape: Shape, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def prefix(shape: Shape) -> Tensor:
    """Causal, but everyone sees the first tokens, of every batch item another number."""
    seen = torch.arange(shape[3]) < (3 + 5 * torch.arange(shape[0]))[:, None, None, None]
    return seen | (distance(shape) >= 0)


def hide(mask: Tensor, number: float = -math.inf) -> Tensor:
    """A mask as a bias."""
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, number)


def lengths(batch: int, length: int) -> Tensor:
    """(B, 1): of every item another part of the tokens; the first item has all of them."""
    return torch.tensor([[max(1, length - item * (length // 3 + 1))] for item in range(batch)]).reshape(batch, 1)


def right_padding(batch: int, length: int) -> Tensor:
    return torch.arange(length) < lengths(batch, length)


def left_padding(batch: int, length: int) -> Tensor:
    return right_padding(batch, length).flip(-1)


def holes(batch: int, length: int, seed: int = 1) -> Tensor:
    mask = torch.rand(batch, length, generator=generator(seed)) < 0.7
    mask[:, length // 2 :][:, :1] = True
    return mask


def slopes(shape: Shape) -> Tensor:
    return 2.0 ** -torch.arange(1, shape[1] + 1, dtype=torch.float64)


def alibi(shape: Shape) -> Tensor:
    return -slopes(shape)[:, None, None] * distance(shape).abs()


def sinks(shape: Shape) -> Tensor:
    """One far above all logits, one far below, others among them."""
    return torch.tensor([0.5, 30.0, -30.0, 2.0], dtype=torch.float64).repeat(shape[1])[: shape[1]]


def _keys(make: Callable[[int, int], Tensor]) -> Callable[[Shape], dict[str, Any]]:
    return lambda shape: {"key_mask": make(shape[0], shape[3])}


BLOCK_FORMS: dict[str, Callable[[Shape], dict[str, Any]]] = {
    "plain": lambda _: {},
    "right padding": _keys(right_padding),
    "left padding": _keys(left_padding),
    "holes": _keys(holes),
    "padded queries": lambda shape: {"query_mask": holes(shape[0], shape[2], 2)},
    "padded queries and keys": lambda shape: {
        "query_mask": left_padding(shape[0], shape[2]),
        "key_mask": left_padding(shape[0], shape[3]),
    },
    "padding as a full mask": lambda shape: {
        "bias": left_padding(shape[0], shape[3])[:, None, None].expand(shape).clone()
    },
    "padding as a full bias": lambda shape: {"bias": hide(right_padding(shape[0], shape[3])[:, None, None])},
    "queries without a key": lambda shape: {"bias": (torch.arange(shape[2]) % 5 > 0)[:, None].expand(shape[2:])},
    "bias": lambda shape: {"bias": 2 * normal(shape)},
    "bias of keys": lambda shape: {"bias": normal(shape)[:, :, :1]},
    "alibi": lambda shape: {"bias": alibi(shape)},
    "slopes": lambda shape: {"alibi_slopes": slopes(shape)},
    "slopes, holes": lambda shape: {"alibi_slopes": slopes(shape), "key_mask": holes(shape[0], shape[3])},
    "softcap": lambda _: {"softcap": 0.7},
    "softcap, bias": lambda shape: {"softcap": 0.7, "bias": 2 * normal(shape)},
    "sinks": lambda shape: {"sinks": sinks(shape)},
    "first order": lambda _: {"coarse": "first_order"},
    "first order, left padding": lambda shape: {
        "coarse": "first_order",
        "key_mask": left_padding(shape[0], shape[3]),
    },
    "first order, holes, padded queries": lambda shape: {
        "coarse": "first_order",
        "key_mask": holes(shape[0], shape[3]),
        "query_mask": holes(shape[0], shape[2], 2),
    },
    "first order, bias, sinks": lambda shape: {
        "coarse": "first_order",
        "bias": 2 * normal(shape),
        "sinks": sinks(shape),
    },
    "first order, slopes, right padding": lambda shape: {
        "coarse": "first_order",
        "alibi_slopes": slopes(shape),
        "key_mask": right_padding(shape[0], shape[3]),
    },
    "softcap, slopes, sinks, left padding": lambda shape: {
        "softcap": 0.7,
        "alibi_slopes": slopes(shape),
        "sinks": sinks(shape),
        "key_mask": left_padding(shape[0], shape[3]),
    },
}
TOKEN_FORMS: dict[str, Callable[[Shape], dict[str, Any]]] = {
    "no pooled queries": lambda _: {"pool_queries": False},
    "no pooled queries, bias": lambda shape: {"pool_queries": False, "bias": 2 * normal(shape)},
    "causal": lambda _: {"is_causal": True},
    "causal, lower right": lambda _: {"lower_right": True},
    "window": lambda _: {"window": (9, 4)},
    "window, one side": lambda _: {"window": (-1, 6)},
    "causal window": lambda _: {"is_causal": True, "window": (14, -1)},
    "causal, left padding": lambda shape: {"is_causal": True, "key_mask": left_padding(shape[0], shape[3])},
    "causal, right padding": lambda shape: {"is_causal": True, "key_mask": right_padding(shape[0], shape[3])},
    "causal, padded queries": lambda shape: {"is_causal": True, "query_mask": holes(shape[0], shape[2], 2)},
    "window, left padding": lambda shape: {"window": (9, 4), "key_mask": left_padding(shape[0], shape[3])},
    "window, holes": lambda shape: {"window": (12, 12), "key_mask": holes(shape[0], shape[3])},
    "causal mask": lambda shape: {"bias": distance(shape) >= 0},
    "window mask": lambda shape: {"bias": distance(shape).abs() <= 11},
    "document mask": lambda shape: {"bias": documents(shape)},
    "prefix mask": lambda shape: {"bias": prefix(shape)},
    "random mask": lambda shape: {"bias": normal(shape) > 0.3},
    "mask of few pairs": lambda shape: {"bias": normal(shape) > 2.0},
    "mask of each head": lambda shape: {
        "bias": (torch.arange(shape[3]) < (20 + 9 * torch.arange(shape[1]))[:, None, None]).expand(shape[1:])
    },
    "mask and causal": lambda shape: {"is_causal": True, "bias": documents(shape)},
    "mask and window": lambda shape: {"window": (20, 20), "bias": normal(shape) > -1.0},
    "bias that hides": lambda shape: {"bias": (2 * normal(shape)).masked_fill(~documents(shape), -math.inf)},
    "bias with a huge number": lambda shape: {"bias": hide(distance(shape) >= 0, -1e9)},
    "causal, first order": lambda _: {"is_causal": True, "coarse": "first_order"},
    "causal, slopes": lambda shape: {"is_causal": True, "alibi_slopes": slopes(shape)},
    "lower right, slopes, softcap": lambda shape: {"lower_right": True, "alibi_slopes": slopes(shape), "softcap": 0.7},
    "causal window, softcap, sinks": lambda shape: {
        "is_causal": True,
        "window": (14, -1),
        "softcap": 0.7,
        "sinks": sinks(shape),
    },
    "random mask, slopes, softcap, sinks": lambda shape: {
        "bias": normal(shape) > 0.3,
        "alibi_slopes": slopes(shape),
        "softcap": 0.7,
        "sinks": sinks(shape),
    },
    "no pooled queries, slopes, bias": lambda shape: {
        "pool_queries": False,
        "alibi_slopes": slopes(shape),
        "bias": 2 * normal(shape),
    },
    "window, left padding, slopes, sinks": lambda shape: {
        "window": (9, 4),
        "key_mask": left_padding(shape[0], shape[3]),
        "alibi_slopes": slopes(shape),
        "sinks": sinks(shape),
    },
}
FORMS = BLOCK_FORMS | TOKEN_FORMS
by_form = pytest.mark.parametrize("form", FORMS)
by_token_form = pytest.mark.parametrize("form", TOKEN_FORMS)
by_block_form = pytest.mark.parametrize("form", BLOCK_FORMS)


def settings_of(form: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, **more: Any) -> Settings:
    """The settings of a form for (B, H, Lq, Lk, ...) and inputs of a dtype: blocks of 8, two of them for each row."""
    made = FORMS[form]((shape[0], shape[1], shape[2], shape[3]))
    if dtype != torch.float64 and "bias" in made and made["bias"].is_floating_point():
        made["bias"] = made["bias"].float()
    return Settings(**({"block_size": 8, "blocks_per_row": 2.0} | made | more))


def visible_pairs(form: str, shape: tuple[int, ...]) -> Tensor:
    """(B, H, Lq, Lk) bool: whom a query sees, without regard to blocks. Huge negative numbers hide, too."""
    sizes = (shape[0], shape[1], shape[2], shape[3])
    s = settings_of(form, shape)
    seen = torch.ones(sizes, dtype=torch.bool)
    ahead = -distance(sizes) - (shape[3] - shape[2] if s.lower_right else 0)
    if s.is_causal or s.lower_right:
        seen &= ahead <= 0
    if s.window[0] >= 0:
        seen &= ahead >= -s.window[0]
    if s.window[1] >= 0:
        seen &= ahead <= s.window[1]
    if s.key_mask is not None:
        seen &= s.key_mask[:, None, None]
    if s.query_mask is not None:
        seen &= s.query_mask[:, None, :, None]
    if s.bias is not None:
        seen &= s.bias if s.bias.dtype is torch.bool else s.bias > -1e8
    return seen
