"""Which weights a seed drops: the hash that src/kernels/dropout.rs describes, written once more.

A weight has a place: batch item and head, query and key; or row and block, where a coarse block is one weight.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_BLOCKS = 0x5851_F42D_4C95_7F2D


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return x ^ (x >> np.uint64(31))


def _hash(low: np.ndarray, high: np.ndarray, column: np.ndarray) -> np.ndarray:
    """32 bits for every weight: lowbias32 with half of the row's bits put in before each round."""
    x = column * np.uint32(0x9E37_79B9) ^ low
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB_352D) ^ high
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846C_A68B)
    return x ^ (x >> np.uint32(16))


def _kept(salt: int, seed: int, p: float, shape: tuple[int, int, int, int]) -> Tensor:
    batch, heads, rows, columns = shape
    with np.errstate(over="ignore"):
        start = _mix(np.array([(seed % 2**64) ^ salt], dtype=np.uint64))
        golden = np.uint64(0x9E37_79B9_7F4A_7C15)
        head = _mix((start + golden) ^ np.arange(batch * heads, dtype=np.uint64))
        row = _mix((head + golden)[:, None] ^ np.arange(rows, dtype=np.uint64))
        low = (row & np.uint64(0xFFFF_FFFF)).astype(np.uint32)[..., None]
        high = (row >> np.uint64(32)).astype(np.uint32)[..., None]
        hashes = _hash(low, high, np.arange(columns, dtype=np.uint32))
    threshold = min(2**32 - 1, round(p * 2**32))
    return torch.from_numpy((hashes >= threshold).reshape(shape))


def kept_weights(
    seed: int, p: float, keys: tuple[int, ...], blocks: tuple[int, ...], level: int = 0
) -> tuple[Tensor, Tensor]:
    """Whether the weights of keys, (B, H, Lq, Lk), and of blocks, (B, H, rows, nk), are kept.

    Rows are query blocks in the block form and tokens in the token form. The blocks are those of a level, counted from
    the coarsest one.
    """
    return _kept(0, seed, p, tuple(keys)), _kept(_BLOCKS * (2 * level + 1) % 2**64, seed, p, tuple(blocks))


def keep_factors(
    seed: int, p: float, keys: tuple[int, ...], blocks: tuple[int, ...], level: int = 0
) -> tuple[Tensor, Tensor]:
    """What the weights are multiplied by: 0, or 1 / (1 - p)."""
    factor = 1.0 / (1.0 - p) if p < 1.0 else 0.0
    tokens, coarse = kept_weights(seed, p, keys, blocks, level)
    return tokens.double() * factor, coarse.double() * factor


def drawn_seed(torch_seed: int) -> int:
    """The seed that a call draws after `torch.manual_seed(torch_seed)`."""
    generator = torch.Generator().manual_seed(torch_seed)
    return int(torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, generator=generator)) % 2**64
