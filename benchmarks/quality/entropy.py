"""The paper's sweep: error against the entropy of the rows, with the logits times s from 1/16 to 16."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from mra_attention import scaled_dot_product_attention as mra
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..long import exact
from .baselines import nystrom, window
from .data import Attention, Heads

FACTORS = tuple(2.0**power for power in range(-4, 5))
SHARPNESS = 5.0
"""Of the kernel of the curves, exp(-5 (H - H')^2), as in the paper."""

KEYS, CAUSAL_KEYS = 128, 512
"""Keys of a query whose products an approximation may compute: of 512, and of up to 8192 where heads are causal."""


@dataclass
class Head:
    """One head at one factor."""

    method: str
    factor: float
    entropy: float
    """Mean over the rows, in nats."""
    error: float


def _ours(blocks_per_row: float, **keywords: object) -> Attention:
    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        return mra(query, key, value, scale=scale, enable_gqa=grouped, blocks_per_row=blocks_per_row, **keywords)

    return attend


METHODS: dict[bool, dict[str, Attention]] = {
    False: {
        "MRA, means": _ours(KEYS / 32),
        "MRA, first order": _ours(KEYS / 32, coarse="first_order"),
        "sparse: best blocks alone": _ours(KEYS / 32, mode="sparse"),
        "low rank: Nystrom, 32 landmarks": partial(nystrom, landmarks=KEYS // 4),
        "low rank: Nystrom, 64 landmarks": partial(nystrom, landmarks=KEYS // 2),
        "window": partial(window, width=KEYS),
    },
    True: {
        "MRA, means": _ours(CAUSAL_KEYS / 32, is_causal=True, score="mean"),
        "MRA, largest key": _ours(CAUSAL_KEYS / 32, is_causal=True, score="max"),
        "sparse: best blocks alone": _ours(CAUSAL_KEYS / 32, is_causal=True, score="mean", mode="sparse"),
        "window": _ours(math.inf, is_causal=True, window_size=(CAUSAL_KEYS - 1, 0)),
    },
}
"""By whether heads are causal, which landmarks cannot be. 64 of them have the products of 128 exact keys."""


def sweep(heads: Heads) -> list[Head]:
    """Return entropy and error of every head at every factor with every method."""
    found: list[Head] = []
    for factor in tqdm(FACTORS, desc="entropy", unit="factor", leave=False):
        scale = factor * heads.scale
        for layer in heads.layers:
            expected, entropies = exact.exact_and_entropy(*layer, heads.rows, scale, causal=heads.causal)
            for name, method in METHODS[heads.causal].items():
                errors = exact.errors(method(*layer, scale), heads.rows, expected).tolist()
                found += [Head(name, factor, h, e) for h, e in zip(entropies.tolist(), errors, strict=True)]
    return found


def curve(heads: Sequence[Head], entropies: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the error at these entropies, by kernel regression over the heads of one method."""
    at = np.array([head.entropy for head in heads])
    errors = np.array([head.error for head in heads])
    weights = np.exp(-SHARPNESS * (entropies[:, None] - at) ** 2)
    return (weights @ errors) / weights.sum(1)
