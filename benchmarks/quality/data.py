"""The heads whose errors are measured, with their exact outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from mra_attention import scaled_dot_product_attention as mra
from torch import Tensor

from ..long import exact
from ..long.heads import heads

MINILM = Path(__file__).parents[2] / "tests" / "data" / "minilm_qkv.npz"
LONGEST_WHOLE = 1024
"""Tokens up to which every query is looked at; beyond, a sample."""

Layer = tuple[Tensor, Tensor, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""From query, key, value and scale of a layer to its output (1, H, L, Dv)."""


@dataclass
class Heads:
    """Layers of one shape: query (1, H, L, D), key and value (1, Hk, L, D), float32."""

    name: str
    layers: list[Layer]
    scale: float
    causal: bool
    real: bool = True
    """Whether a model made them."""
    _exact: dict[tuple[int, float], Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of each sequence."""
        return self.layers[0][0].shape[2]

    @functools.cached_property
    def rows(self) -> Tensor:
        """The places of the queries that are looked at."""
        return torch.arange(self.length) if self.length <= LONGEST_WHOLE else exact.sample(self.length)

    def expected(self, layer: int, factor: float = 1.0) -> Tensor:
        """Return the exact output (H, rows, Dv) in float64, with the logits times a factor."""
        key = layer, factor
        if key not in self._exact:
            scale = factor * self.scale
            self._exact[key] = exact.exact_rows(*self.layers[layer], self.rows, scale, causal=self.causal)
        return self._exact[key]

    def attention(self, keywords: dict[str, object]) -> Attention:
        """Return the package's attention with settings."""
        options = {"is_causal": self.causal, "enable_gqa": self.layers[0][0].shape[1] != self.layers[0][1].shape[1]}

        def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            return mra(query, key, value, scale=scale, **options, **keywords)

        return attend

    def error(self, keywords: dict[str, object]) -> float:
        """Return the relative error with settings, mean over the heads of all layers."""
        attention = self.attention(keywords)
        errors = [
            exact.error(attention(*layer, self.scale), self.rows, self.expected(i))
            for i, layer in enumerate(self.layers)
        ]
        return sum(errors) / len(errors)


def minilm() -> Heads:
    """Return layers 1 and 4 of a sentence encoder: 12 heads of 32 channels, 512 tokens."""
    data = np.load(MINILM)
    layers = [tuple(torch.from_numpy(data[f"{name}{layer}"]).float()[None] for name in "qkv") for layer in (1, 4)]
    return Heads("MiniLM", layers, 32**-0.5, causal=False)


def synthetic(length: int) -> Heads:
    """Return heads like those of a decoder: 4 of 64 channels."""
    return Heads("synthetic decoder", [heads(length)], 64**-0.5, causal=True, real=False)


def gemma(cache: Path, length: int) -> Heads:
    """Return the 3 global layers of Gemma 3 270M: 4 heads of 256 channels, one of keys and values."""
    from ..long import real

    return Heads("Gemma 3 270M", real.layers(cache, length), real.SCALE, causal=True)
