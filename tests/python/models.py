"""Small models built on torch's attention, in float64, with dropout off, and what it is replaced by."""

from __future__ import annotations

import math
from typing import Any

import mra_attention
import torch
from torch import Tensor, nn

# Bound early, as many libraries do it: no later change of torch.nn.functional can be seen here.
from torch.nn.functional import scaled_dot_product_attention as early_bound

WIDTH, HEADS, LENGTH = 16, 2, 90

EXACT = {"blocks_per_row": math.inf, "min_length": 0}
FEW_SETTINGS = {"resolutions": (8, 1), "blocks_per_row": 1}
FEW = FEW_SETTINGS | {"min_length": 0}


def qkv(length: int = 300, *, batch: int = 1, heads: int = HEADS, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(batch, heads, length, 8, generator=generator, dtype=dtype) for _ in range(3)]


def few(*arguments, **keywords) -> Tensor:
    """Return what `replace_sdpa(**FEW)` makes of a call."""
    return mra_attention.scaled_dot_product_attention(*arguments, **keywords, **FEW_SETTINGS)


class VisionAttention(nn.Module):
    """Attention as in libraries of vision models: fused projection, the function called by name."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        out = early_bound(query, key, value, dropout_p=0.0)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


def vision_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(VisionAttention(), nn.LayerNorm(WIDTH), VisionAttention()).double().eval()


def encoder(**settings: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True, dtype=torch.float64, **settings
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not settings).eval()


def transformer() -> nn.Transformer:
    torch.manual_seed(0)
    return nn.Transformer(WIDTH, HEADS, 1, 1, 2 * WIDTH, dropout=0.0, batch_first=True, dtype=torch.float64).eval()


def tokens(length: int = LENGTH, *, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def padding(length: int = LENGTH) -> Tensor:
    """True at the padded end of the second sequence."""
    mask = torch.zeros(2, length, dtype=torch.bool)
    mask[1, 2 * length // 3 :] = True
    return mask


def causal(length: int = LENGTH) -> Tensor:
    """True where the key is hidden, as torch's modules have it."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def as_bias(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill_(mask, -math.inf)


ENCODER_MASKS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "padding": {"src_key_padding_mask": padding()},
    "padding as a bias": {"src_key_padding_mask": as_bias(padding())},
    "causal": {"mask": causal(), "is_causal": True},
    "causal, detected": {"mask": as_bias(causal())},
    "causal and padding": {"mask": causal(), "src_key_padding_mask": padding()},
    "pairs": {"mask": torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.3},
    "pairs and padding": {"mask": causal().roll(3, 0), "is_causal": False, "src_key_padding_mask": padding()},
}
"""Arguments of an encoder. Every query sees a key."""


def valid(out: Tensor, masks: dict[str, Any]) -> Tensor:
    """Return the outputs of the valid tokens; torch leaves open what padded ones get."""
    return out[~padding()] if "src_key_padding_mask" in masks else out
