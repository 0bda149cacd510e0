"""The cases of `make bench`: what is compared, and the ratio that it should reach."""

from __future__ import annotations

from dataclasses import dataclass, field

EVERYTHING = {"num_blocks": 2**40}


@dataclass(frozen=True)
class Case:
    """SDPA against this package on standard-normal inputs (1, heads, length, head_dim)."""

    name: str
    length: int
    least: float
    """The ratio of SDPA's time to ours that should hold."""
    heads: int = 8
    head_dim: int = 64
    backward: bool = False
    causal: bool = False
    keywords: dict[str, object] = field(default_factory=dict)


CASES = [
    Case("forward, L 4096", 4096, 30),
    Case("forward + backward, L 4096", 4096, 25, backward=True),
    Case("forward, L 16384, H 2", 16384, 90, heads=2),
    Case("forward, L 512", 512, 3),
    Case("forward + backward, L 512", 512, 3, backward=True),
    Case("every block, forward, L 2048", 2048, 1.3, keywords=EVERYTHING),
    Case("every block, forward + backward, L 2048", 2048, 1.1, backward=True, keywords=EVERYTHING),
    Case("causal, forward, L 8192, 8 blocks", 8192, 10, causal=True, keywords={"blocks_per_row": 8}),
    Case(
        "causal, forward + backward, L 8192, 8 blocks",
        8192,
        7,
        backward=True,
        causal=True,
        keywords={"blocks_per_row": 8},
    ),
]
