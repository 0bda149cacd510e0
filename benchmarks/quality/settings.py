"""Every setting that ships and makes the error smaller or larger, by the number of exact keys of a query."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FromKeys = Callable[[int], dict[str, Any]]
"""From exact keys of a query to keywords."""


def _blocks(size: int, **keywords: Any) -> FromKeys:
    return lambda keys: {"resolutions": (size, 1), "blocks_per_row": keys / size, "score": "mean", **keywords}


def _ladder(resolutions: tuple[int, ...], refined: float, **keywords: Any) -> FromKeys:
    size = resolutions[-2]
    return lambda keys: {"resolutions": resolutions, "blocks_per_row": (refined, keys / size), **keywords}


REFERENCE = "means"
"""The setting beside which the tables put all others: the paper's MRA-2."""

ENCODER: dict[str, FromKeys] = {
    REFERENCE: _blocks(32),
    "sparse": _blocks(32, mode="sparse"),
    "first order": _blocks(32, coarse="first_order"),
    "means, shift 0.5": _blocks(32, coarse_shift=0.5),
    "blocks of 16": _blocks(16),
    "ladder (128, 32, 1)": _ladder((128, 32, 1), 2),
    "each token chooses": _blocks(32, pool_queries=False),
    "each token, largest key": _blocks(32, pool_queries=False, score="max"),
}
"""Of heads where every token sees all others."""

DECODER: dict[str, FromKeys] = {
    REFERENCE: _blocks(32),
    "sparse": _blocks(32, mode="sparse"),
    "means, shift 0.8": _blocks(32, coarse_shift=0.8),
    "largest key": _blocks(32, score="max"),
    "largest key, shift 0.8": _blocks(32, score="max", coarse_shift=0.8),
    "blocks of 16": _blocks(16),
    "4 local blocks": _blocks(32, local_blocks=4),
    "ladder (512, 32, 1)": _ladder((512, 32, 1), 8),
}
"""Of causal heads."""

ENCODER_KEYS = (32, 48, 64, 96, 128, 192, 256)
DECODER_KEYS = (128, 256, 512, 1024)
"""Exact keys of a query."""

TABLE_KEYS = {False: (64, 128, 256), True: (256, 512, 1024)}
"""Exact keys of the reference whose time the others get, by whether heads are causal."""
