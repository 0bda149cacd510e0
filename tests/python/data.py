"""The recorded data in tests/data."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from oracle import Settings
from torch import Tensor

DATA = Path(__file__).parent.parent / "data"
UPSTREAM = sorted(path.stem for path in DATA.glob("upstream_*.npz"))


class Upstream(NamedTuple):
    """One run of the paper's released PyTorch code: inputs stored in float16, computed in float32."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    settings: Settings


def load_upstream(name: str) -> Upstream:
    with np.load(DATA / f"{name}.npz") as stored:
        tensors = [torch.from_numpy(stored[x]).float() for x in ("q", "k", "v", "dout", "out", "dq", "dk", "dv")]
        settings = Settings(
            block_size=int(stored["block_size"]),
            mode=str(stored["mode"]),
            num_blocks=int(stored["num_blocks"]),
            first_blocks=int(stored["first_blocks"]),
            diagonal_blocks=int(stored["diagonal_blocks"]),
        )
    return Upstream(*tensors, settings)


def load_minilm(layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value of shape (1, 12, 512, 32), float32: a layer of a pretrained sentence encoder on real text."""
    with np.load(DATA / "minilm_qkv.npz") as stored:
        query, key, value = (torch.from_numpy(stored[f"{name}{layer}"]).float()[None] for name in "qkv")
    return query, key, value
