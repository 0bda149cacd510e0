"""The cases of `make bench`: what is compared, and the ratio that it aims at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

EVERYTHING = {"num_blocks": 2**40}
EIGHT_BLOCKS = {"blocks_per_row": 8, "score": "mean"}  # the choice of the paper; the quality tables have the others
WINDOW, DOCUMENT = 512, 512


@dataclass(frozen=True)
class Case:
    """SDPA against this package on standard-normal inputs (1, heads, length, head_dim)."""

    name: str
    length: int
    aim: float
    """The ratio of SDPA's time to ours to reach."""
    heads: int = 8
    head_dim: int = 64
    backward: bool = False
    causal: bool = False
    keywords: Mapping[str, object] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    @property
    def tolerance(self) -> float:
        """Relative error against float64 of the same formulas: of bfloat16, 8 roundings."""
        return 8 * torch.finfo(torch.bfloat16).eps / 2 if self.dtype == torch.bfloat16 else 1e-5


CASES = [
    Case("forward, L 4096", 4096, 30),
    Case("forward + backward, L 4096", 4096, 25, backward=True),
    Case("forward, L 16384, H 2", 16384, 90, heads=2),
    Case("forward, L 512", 512, 3),
    Case("forward + backward, L 512", 512, 3, backward=True),
    Case("every block, forward, L 2048", 2048, 1.3, keywords=EVERYTHING),
    Case("every block, forward + backward, L 2048", 2048, 1.1, backward=True, keywords=EVERYTHING),
    Case("causal, forward, L 8192, 8 blocks", 8192, 10, causal=True, keywords=EIGHT_BLOCKS),
    Case(
        "causal, forward + backward, L 8192, 8 blocks",
        8192,
        7,
        backward=True,
        causal=True,
        keywords=EIGHT_BLOCKS,
    ),
]


def _bfloat16(name: str, length: int, aim: float, **settings: Any) -> Case:
    return Case(f"bfloat16, {name}, L {length}", length, aim, dtype=torch.bfloat16, **settings)


BFLOAT16_CASES = [
    _bfloat16("every block, forward", 2048, 1.7, keywords=EVERYTHING),
    _bfloat16("every block, forward + backward", 2048, 2.2, backward=True, keywords=EVERYTHING),
    _bfloat16("every block, D 128, forward", 2048, 1.4, head_dim=128, keywords=EVERYTHING),
    _bfloat16("forward", 4096, 10, keywords={"blocks_per_row": 4}),
    _bfloat16("causal, 8 blocks, forward", 8192, 5, causal=True, keywords=EIGHT_BLOCKS),
]
"""SDPA in bfloat16 against ours in bfloat16; the aims are those of CPUs with AMX, which both sides use there."""


@dataclass(frozen=True)
class MaskedCase:
    """SDPA with a mask of pairs against this package, every block exact, L 8192, 4 heads."""

    name: str
    pairs: Literal["window", "documents", "random"]
    """What is visible: 512 tokens up to the own one, 16 documents of 512 tokens, or half of all pairs."""
    spelled: Literal["window_size", "attn_mask", "BlockMask"]
    aim: float
    backward: bool = False

    length: int = 8192
    heads: int = 4
    head_dim: int = 64

    def mask(self) -> Tensor:
        """Return the mask (L, L) that SDPA gets."""
        place = torch.arange(self.length)
        query, key = place[:, None], place[None]
        if self.pairs == "window":
            return (key <= query) & (key > query - WINDOW)
        if self.pairs == "documents":
            return query // DOCUMENT == key // DOCUMENT
        return torch.rand(self.length, self.length, generator=torch.Generator().manual_seed(0)) < 0.5

    def keywords(self, mask: Tensor) -> dict[str, object]:
        """Return what this package gets in its place. Blocks of 64 tokens are a little faster here than those of 32."""
        settings: dict[str, object] = {"blocks_per_row": math.inf, "resolutions": (64, 1)}
        if self.spelled == "window_size":
            return settings | {"is_causal": True, "window_size": (WINDOW - 1, 0)}
        if self.spelled == "attn_mask":
            return settings | {"attn_mask": mask}

        def same_document(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return query // DOCUMENT == key // DOCUMENT

        made = create_block_mask(same_document, None, None, self.length, self.length, device="cpu")
        return settings | {"attn_mask": made}


MASKED_CASES = [
    MaskedCase("window of 512, forward", "window", "window_size", 20),
    MaskedCase("window of 512, forward + backward", "window", "window_size", 15, backward=True),
    MaskedCase("window of 512 as a mask, forward", "window", "attn_mask", 10),
    MaskedCase("16 documents as a mask, forward", "documents", "attn_mask", 10),
    MaskedCase("16 documents as a mask, forward + backward", "documents", "attn_mask", 10, backward=True),
    MaskedCase("16 documents as a BlockMask, forward", "documents", "BlockMask", 10),
    MaskedCase("half of all pairs as a mask, forward", "random", "attn_mask", 1),
]
