"""`resolutions="auto"`: a ladder from the length, so that neither time nor memory has a term in its square.

A level is added above the coarsest one where that would have more than `MOST_BLOCKS` blocks, and every level above the
finest refines `REFINED` blocks per row. At the length where a level is added its blocks are no more than `REFINED`: all
are refined, as if it were not there. So the error has no step there but that of `score="max"`, which ladders have not.
Causal attention takes 1.3 times as long with 8193 tokens as with 8192: the means of both levels are multiplied.

A ratio of 16 fills the vectors of AVX-512 with the children of a block. With 8, and so one level more for as many
candidates, causal attention at 65536 tokens had the same error and took a quarter more time. With half of the blocks,
128 and 8, it took a sixth less, but the error of heads like those of a decoder grew by an eighth.
"""

from __future__ import annotations

from typing import Any

FINEST = 32
RATIO = 16
MOST_BLOCKS = 256
REFINED = MOST_BLOCKS // RATIO


def resolutions(length: int) -> tuple[int, ...]:
    """Return the resolutions for a length."""
    sizes = [FINEST]
    # For a length that is known later, this asks which range it lies in: a program is made for each of few.
    while length > MOST_BLOCKS * sizes[0]:
        sizes.insert(0, RATIO * sizes[0])
    return (*sizes, 1)


def budgets(levels: int, finest: Any) -> Any:
    """Return `blocks_per_row` for so many levels, of which the last one has the budget `finest`."""
    return finest if levels == 1 else (*((float(REFINED),) * (levels - 1)), finest)
