"""The paper's sweep: error against the entropy of the rows, with the logits times s from 1/16 to 16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from mra_attention import scaled_dot_product_attention as mra
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from .baselines import nystrom, window
from .data import Attention, Heads

FACTORS = tuple(2.0**power for power in range(-4, 5))
SHARPNESS = 5.0
"""Of the kernel of the curves, exp(-5 (H - H')^2), as in the paper."""

KEYS = 128
"""Keys of a query whose products an approximation may compute, of 512."""


@dataclass
class Head:
    """One head at one factor."""

    method: str
    factor: float
    entropy: float
    """Mean over the rows, in nats."""
    error: float


def _ours(**keywords: object) -> Attention:
    return lambda query, key, value, scale: mra(query, key, value, scale=scale, **keywords)


METHODS: dict[str, Attention] = {
    "MRA, means": _ours(blocks_per_row=KEYS / 32),
    "MRA, first order": _ours(blocks_per_row=KEYS / 32, coarse="first_order"),
    "sparse: best blocks alone": _ours(blocks_per_row=KEYS / 32, mode="sparse"),
    "low rank: Nystrom, 32 landmarks": partial(nystrom, landmarks=KEYS // 4),
    "low rank: Nystrom, 64 landmarks": partial(nystrom, landmarks=KEYS // 2),
    "window": partial(window, width=KEYS),
}
"""With 64 landmarks Nystrom has as many products as a window or exact blocks of 128 keys."""


def sweep(heads: Heads) -> list[Head]:
    """Return entropy and error of every head at every factor with every method; the heads are not causal."""
    found: list[Head] = []
    for factor in tqdm(FACTORS, desc="entropy", unit="factor", leave=False):
        scale = factor * heads.scale
        for layer in heads.layers:
            entropies, expected = _exact(*layer, scale)
            for name, method in METHODS.items():
                away = (method(*layer, scale).double() - expected).flatten(2).norm(dim=2)[0]
                errors = (away / expected.flatten(2).norm(dim=2)[0]).tolist()
                found += [Head(name, factor, h, e) for h, e in zip(entropies, errors, strict=True)]
    return found


def _exact(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[list[float], Tensor]:
    """Return the mean entropy of the rows of each head, and the output (1, H, L, Dv), in float64."""
    weights = (scale * query.double() @ key.double().mT).softmax(-1)
    return torch.special.entr(weights).sum(-1).mean(-1)[0].tolist(), weights @ value.double()


def curve(heads: Sequence[Head], entropies: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the error at these entropies, by kernel regression over the heads of one method."""
    at = np.array([head.entropy for head in heads])
    errors = np.array([head.error for head in heads])
    weights = np.exp(-SHARPNESS * (entropies[:, None] - at) ** 2)
    return (weights @ errors) / weights.sum(1)
