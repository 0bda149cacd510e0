"""The order in which the tokens of a grid are cut into blocks: tiles, and tiles of tiles."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

_torch: Any = torch


def tile_shapes(resolutions: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return rows and columns of a tile of each resolution.

    Each is made of tiles of the next one, and as square as the factors allow, rather wide than tall: (4, 8) and (1, 1)
    for the resolutions (32, 1).
    """
    shapes = [(1, 1)]
    for finer, coarser in itertools.pairwise(reversed(resolutions)):
        factor, (rows, columns) = coarser // finer, shapes[0]
        splits = [(rows * part, columns * (factor // part)) for part in range(1, factor + 1) if factor % part == 0]
        shapes.insert(0, min(splits, key=lambda shape: (max(shape) / min(shape), shape[0])))
    return shapes


def _cut(line: range, size: int) -> list[range]:
    """Cut rows or columns into parts of about this size that differ by one at most."""
    count = max(1, round(len(line) / size))
    return [line[len(line) * part // count : len(line) * (part + 1) // count] for part in range(count)]


def _walk(rows: range, columns: range, tiles: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Go through the cells of a rectangle, so that as many as a tile of any resolution has lie together.

    Bands as high as a tile are walked in turn to the right and to the left, each one tile of the next resolution after
    the other. A tile then begins wherever the one before ended, at the turns too. So neither a grid that tiles do not
    divide nor tokens before the grid leave tiles with few cells.
    """
    if len(tiles) == 1:
        yield from itertools.product(rows, columns)
        return
    for number, band in enumerate(_cut(rows, tiles[0][0])):
        parts = _cut(columns, tiles[1][1])
        for part in reversed(parts) if number % 2 else parts:
            yield from _walk(band, part, tiles[1:])


@lru_cache(maxsize=64)
def _places(rows: int, columns: int, resolutions: tuple[int, ...]) -> tuple[Any, Any]:
    """Return the order of the cells of a grid, numbered row by row, and its inverse, as arrays."""
    cells = _walk(range(rows), range(columns), tile_shapes(resolutions))
    order = np.fromiter((row * columns + column for row, column in cells), np.int64, rows * columns)
    return order, np.argsort(order)


@_torch.compiler.assume_constant_result
def _cells(rows: int, columns: int, resolutions: tuple[int, ...], inverse: bool) -> Tensor:
    # Arrays are kept and no tensors: those made under a mode, such as inference, are of no use without it. `lift_fresh`
    # lets modes make of a tensor from outside what they make of constants.
    array = _places(rows, columns, resolutions)[inverse]
    return _torch.ops.aten.lift_fresh.default(_torch.from_numpy(array))


def grid_order(grid: tuple[int, int], resolutions: tuple[int, ...], length: int) -> tuple[Tensor, Tensor]:
    """Return the order of a sequence that ends in a grid, and its inverse.

    Parameters
    ----------
    grid : tuple of two int
        Rows and columns. The tokens of a row are neighbours in the sequence.
    resolutions : tuple of int
        Sizes of blocks, each dividing the one before, 1 the last.
    length : int
        Tokens of the sequence, at least those of the grid. Those before the grid stay the first ones.

    Returns
    -------
    tuple of Tensor
        int64 `(length,)`: the token at each place, and the place of each token.
    """
    # A compiler may take any number for one that changes; that of the grid does not.
    rows, columns, *sizes = [operator.index(number) for number in (*grid, *resolutions)]
    leading = length - rows * columns
    cells = [_cells(rows, columns, tuple(sizes), inverse) for inverse in (False, True)]
    if leading == 0:
        return cells[0], cells[1]
    first = torch.arange(leading, device="cpu")
    return torch.cat((first, cells[0] + leading)), torch.cat((first, cells[1] + leading))
