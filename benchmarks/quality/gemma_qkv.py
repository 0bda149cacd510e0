"""Queries, keys and values of the global layers of Gemma 3 270M, for two texts, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.models import gemma, text

LENGTH = 8192
SCALE = 1 / 16
LAYERS = 3
TEXTS = ("documentation", "source")


def load(path: Path, name: str, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return query `(4, L, 256)`, key and value `(1, L, 256)` of a global layer, 0 to 2, for one of the texts."""
    with np.load(path) as arrays:
        q, k, v = (torch.from_numpy(arrays[f"{name}.{layer}.{which}"]) for which in "qkv")
    return q, k, v


def capture(path: Path, cache: Path) -> None:
    """Run the model on both texts, and store what its global layers hand to attention."""
    model, tokenizer = gemma.load(cache)
    tokens = {"documentation": text.tokens(tokenizer, LENGTH), "source": text.source_tokens(tokenizer, LENGTH)}
    attention = torch.nn.functional.scaled_dot_product_attention
    arrays: dict[str, Any] = {}
    for name in TEXTS:
        inputs: list[tuple[Tensor, ...]] = []

        def recorded(*args: Any, inputs: list[tuple[Tensor, ...]] = inputs, **kwargs: Any) -> Tensor:
            if kwargs.get("attn_mask") is None:  # the other layers have the mask of their window
                inputs.append(args[:3])
            return attention(*args, **kwargs)

        torch.nn.functional.scaled_dot_product_attention = recorded
        try:
            model.set_attn_implementation("sdpa")
            with torch.no_grad():
                model(tokens[name][None], logits_to_keep=1)
        finally:
            torch.nn.functional.scaled_dot_product_attention = attention
        for layer, qkv in enumerate(inputs):
            arrays |= {f"{name}.{layer}.{which}": x[0].numpy() for which, x in zip("qkv", qkv, strict=True)}
    np.savez(path, **arrays)
