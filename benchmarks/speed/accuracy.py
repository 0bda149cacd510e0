"""Errors on real queries, keys and values: a speed without its error is worth nothing."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mra_attention import scaled_dot_product_attention as mra
from torch import Tensor

from .checks import relative_error

DATA = Path(__file__).parents[2] / "tests" / "data" / "minilm_qkv.npz"
BUDGETS = (1, 2, 4, 8, 16)


@functools.cache
def _layers(length: int) -> list[list[Tensor]]:
    """Return query, key, value (1, 12, length, 32) of two layers of a real encoder."""
    data = np.load(DATA)
    return [[torch.from_numpy(data[f"{name}{layer}"]).double()[None, :, :length] for name in "qkv"] for layer in (1, 4)]


def error_on_real_data(*, causal: bool = False, length: int = 512, **keywords: object) -> float:
    """Return the mean relative error of the output over 24 heads of a real encoder.

    The relative error of a head is ||out - exact|| / ||exact||: the first `length` of 512 tokens, 32 channels, no
    padding. With `causal=True` both sides are causal, though the encoder was not trained so.
    """
    heads = [
        relative_error(out, exact)
        for layer in _layers(length)
        for out, exact in zip(
            mra(*layer, is_causal=causal, **keywords)[0],
            F.scaled_dot_product_attention(*layer, is_causal=causal)[0],
            strict=True,
        )
    ]
    return sum(heads) / len(heads)


def errors() -> dict[str, dict[int, float]]:
    """Return, by mode and blocks_per_row, the error on real data."""
    return {
        mode: {budget: error_on_real_data(blocks_per_row=budget, mode=mode) for budget in BUDGETS}
        for mode in ("full", "sparse")
    }
