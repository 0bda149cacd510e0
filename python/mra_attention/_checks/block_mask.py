"""`BlockMask` of FlexAttention: its blocks are read as they are, `mask_mod` is called for the partial ones only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .._native.tracing import untraced
from .shapes import text
from .tensors import check_cpu

HIDDEN, VISIBLE = -1, -2


@untraced
def grid_and_tiles(mask: Any, batch: int, heads: int, query_length: int, key_length: int) -> tuple[Tensor, Tensor]:
    """Return the blocks as an int32 grid that broadcasts to `(B, H, rows, columns)`, and the masks of partial ones.

    A block of the grid is HIDDEN, VISIBLE, or the number of its mask in the bool tensor `(N, rows of tokens, columns of
    tokens)`.
    """
    rows_of, columns_of = mask.BLOCK_SIZE
    shape = (-(-query_length // rows_of), -(-key_length // columns_of))
    _check(mask, batch, heads, (query_length, key_length), shape)
    partial = _to_grid(mask.kv_num_blocks, mask.kv_indices, shape)
    grid = torch.full(partial.shape, HIDDEN, dtype=torch.int32, device="cpu")
    if mask.full_kv_num_blocks is not None:
        grid[_to_grid(mask.full_kv_num_blocks, mask.full_kv_indices, shape).expand_as(grid)] = VISIBLE
    where = partial.nonzero()
    grid[partial] = torch.arange(where.shape[0], dtype=torch.int32, device="cpu")
    return grid, _tiles(mask, where, (query_length, key_length))


def _check(mask: Any, batch: int, heads: int, lengths: tuple[int, int], shape: tuple[int, int]) -> None:
    check_cpu("attn_mask.kv_indices", mask.kv_indices)
    made_for = tuple(getattr(mask, "seq_lengths", lengths))  # torch 2.5 does not say
    if made_for != lengths or mask.kv_num_blocks.shape[-1] != shape[0]:
        raise ValueError(
            f"attn_mask is a BlockMask of {mask.kv_num_blocks.shape[-1]} block rows for (query length, key length) = "
            f"{text(made_for)}, but query and key have {text(lengths)}"
        )
    given = tuple(mask.kv_num_blocks.shape[:-1])
    if len(given) != 2 or given[0] not in (1, batch) or given[1] not in (1, heads):
        raise ValueError(
            f"attn_mask is a BlockMask for (batch, heads) = {text(given)}, but query has {text((batch, heads))}"
        )


def _to_grid(counts: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return bool `(B, H, rows, columns)`: which blocks the first `counts` of the indices of each row name."""
    named = torch.arange(indices.shape[-1], device="cpu") < counts.unsqueeze(-1)
    rows, columns = shape
    # One more column takes the places that are not used.
    at = torch.where(named, indices, columns).long()
    grid = torch.zeros((*indices.shape[:2], rows, columns + 1), dtype=torch.bool, device="cpu")
    return grid.scatter_(-1, at, True)[..., :columns]


def _tiles(mask: Any, where: Tensor, lengths: tuple[int, int]) -> Tensor:
    """Return what `mask_mod` says of the blocks `where`, with False behind the ends of queries and keys."""
    tokens = [torch.arange(size, device="cpu") for size in mask.BLOCK_SIZE]
    if where.shape[0] == 0:
        return torch.zeros((0, *mask.BLOCK_SIZE), dtype=torch.bool, device="cpu")
    batch, head, row, column = where.unbind(-1)
    queries, keys = (
        first.unsqueeze(-1) * size + places
        for first, size, places in zip((row, column), mask.BLOCK_SIZE, tokens, strict=True)
    )
    inside = (queries < lengths[0]).unsqueeze(-1) & (keys < lengths[1]).unsqueeze(-2)
    # As torch does: a mask_mod is written for single numbers.
    of_keys = torch.vmap(mask.mask_mod, (None, None, None, 0))
    of_pairs = torch.vmap(torch.vmap(of_keys, (None, None, 0, None)))
    visible = of_pairs(batch, head, queries.clamp(max=lengths[0] - 1), keys.clamp(max=lengths[1] - 1))
    return visible.expand_as(inside) & inside


def is_block_mask(mask: Any) -> bool:
    """Return whether a mask is a BlockMask."""
    return isinstance(mask, BlockMask)
