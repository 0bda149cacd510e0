"""A plan as a picture: which level each pair of blocks is left to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def levels_of(masks: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Return the level at which each finest block is coarse; where it is exact, the number of levels.

    Parameters
    ----------
    masks : sequence of Tensor
        For each level bool of shape `(rows, nk)`: the blocks that are refined.
    sizes : sequence of int
        The block sizes of the levels.

    Returns
    -------
    Tensor
        int64, with the shape of the last mask.
    """
    rows, columns = masks[-1].shape
    found = torch.zeros(rows, columns, dtype=torch.int64)
    for size, mask in zip(sizes, masks, strict=True):
        times = size // sizes[-1]
        # In the token form all levels have the same rows.
        tall = mask if mask.shape[0] == rows else mask.repeat_interleave(times, 0)
        found += tall.repeat_interleave(times, 1)[:rows, :columns]
    return found


def draw(levels: Tensor, sizes: Sequence[int], axes: Any, **labels: str) -> Any:
    """Draw what `levels_of` returns, with these labels of the axes; see `Plan.plot`."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("Plan.plot needs matplotlib: pip install matplotlib") from error
    if axes is None:
        axes = pyplot.subplots(layout="constrained")[1]  # pyright: ignore[reportUnknownMemberType]
    image = axes.imshow(levels.numpy(), cmap="Greys", vmin=0, vmax=len(sizes), interpolation="nearest", aspect="auto")
    axes.set(**labels)
    bar = axes.figure.colorbar(image, ax=axes, ticks=range(len(sizes) + 1))
    bar.ax.set_yticklabels([*(f"coarse, {size}" for size in sizes), "exact"])
    return axes
