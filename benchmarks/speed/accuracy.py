"""Errors on real queries, keys and values: a speed without its error is worth nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mra_attention import scaled_dot_product_attention as mra

from .checks import relative_error

DATA = Path(__file__).parents[2] / "tests" / "data" / "minilm_qkv.npz"
BUDGETS = (1, 2, 4, 8, 16)


def errors() -> dict[str, dict[int, float]]:
    """Return, by mode and blocks_per_row, the mean relative error of the output over 24 heads of a real encoder.

    The relative error of a head is ||out - exact|| / ||exact||: 512 tokens, 32 channels, no padding.
    """
    data = np.load(DATA)
    layers = [[torch.from_numpy(data[f"{name}{layer}"]).double()[None] for name in "qkv"] for layer in (1, 4)]
    table: dict[str, dict[int, float]] = {"full": {}, "sparse": {}}
    for mode, row in table.items():
        for budget in BUDGETS:
            heads = [
                relative_error(out, exact)
                for layer in layers
                for out, exact in zip(
                    mra(*layer, blocks_per_row=budget, mode=mode)[0],
                    F.scaled_dot_product_attention(*layer)[0],
                    strict=True,
                )
            ]
            row[budget] = sum(heads) / len(heads)
    return table
