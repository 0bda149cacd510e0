"""The block selection as a value, of either form of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """Which key blocks every query block attends to exactly; the result of `mra_attention.plan`.

    A plan belongs to one problem: its lengths, its block size, its numbers of batch items and heads. Two plans are the
    same if their fields are; compare `bits` with `torch.equal`.

    Parameters
    ----------
    bits : Tensor
        uint8 of shape `(B, H, nq, ceil(nk / 8))` on the CPU, with `nq = ceil(query_length / block_size)` and
        `nk = ceil(key_length / block_size)`. Bit `j % 8` (the least significant is 0) of byte `j // 8` is set where
        block `(i, j)` is selected. All batch dimensions are flattened into `B`; inputs without a batch count as
        `B = 1`, and without heads as `H = 1`.
    query_length, key_length : int
        Lengths in tokens.
    block_size : int
        Tokens per block; the last block of a sequence may be shorter.

    Raises
    ------
    TypeError
        If `bits` is not a uint8 tensor.
    ValueError
        If the shape of `bits` is not the one above.

    Notes
    -----
    docs/definitions.md, section 2, defines the selection.
    """

    bits: Tensor
    query_length: int
    key_length: int
    block_size: int

    def __post_init__(self) -> None:
        bits: Any = self.bits
        if not isinstance(bits, Tensor) or bits.dtype is not torch.uint8:
            found = f"a {bits.dtype} tensor" if isinstance(bits, Tensor) else type(bits).__name__
            raise TypeError(f"bits must be a torch.uint8 tensor, got {found}")
        if self.block_size < 1 or self.query_length < 0 or self.key_length < 0:
            raise ValueError(
                "block_size must be at least 1 and the lengths at least 0, got "
                f"block_size={self.block_size}, query_length={self.query_length}, key_length={self.key_length}"
            )
        rows, row_bytes = self._num_query_blocks, (self._num_key_blocks + 7) // 8
        if bits.dim() != 4 or bits.shape[2] != rows or bits.shape[3] != row_bytes:
            raise ValueError(
                f"bits must have the shape (B, H, {rows}, {row_bytes}) for query_length={self.query_length}, "
                f"key_length={self.key_length} and block_size={self.block_size}, got {tuple(bits.shape)}"
            )

    @property
    def _num_query_blocks(self) -> int:
        return (self.query_length + self.block_size - 1) // self.block_size

    @property
    def _num_key_blocks(self) -> int:
        return (self.key_length + self.block_size - 1) // self.block_size

    def block_mask(self) -> Tensor:
        """Return the selection as a mask of blocks.

        Returns
        -------
        Tensor
            bool of shape `(B, H, nq, nk)`, True where the block is selected.
        """
        places = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        mask = (self.bits.unsqueeze(-1) >> places) & 1
        return mask.flatten(-2)[..., : self._num_key_blocks].bool()

    @property
    def num_blocks(self) -> Tensor:
        """Number of selected blocks: int64 of shape `(B, H)`."""
        return self.block_mask().sum((-2, -1))

    @property
    def density(self) -> Tensor:
        """Selected fraction of the `nq * nk` blocks: float32 of shape `(B, H)`; 0 where there are no blocks."""
        return self.num_blocks / max(self._num_query_blocks * self._num_key_blocks, 1)


@dataclass(frozen=True, eq=False)
class CausalPlan:
    """Which key blocks every token attends to exactly; the result of `mra_attention.plan` of a causal call.

    Parameters
    ----------
    blocks : Tensor
        int32 of shape `(B, H, Lq, W)` on the CPU: the indices of the blocks of each token, ascending, then -1. All
        batch dimensions are flattened into `B`; inputs without a batch count as `B = 1`, and without heads as `H = 1`.
        `W` is at least 1 (where there are keys) and at most `ceil(key_length / block_size)`.
    key_length : int
        Number of keys.
    block_size : int
        Tokens per block; the last block may be shorter.
    offset : int
        Position of the first query among the keys: query `t` sees the keys up to `t + offset`.

    Raises
    ------
    TypeError
        If `blocks` is not an int32 tensor.
    ValueError
        If the shape of `blocks` is not the one above.

    Notes
    -----
    docs/definitions.md, section 3, defines the selection. A block that lies wholly behind a token, or is named twice,
    is left out when the plan is used.
    """

    blocks: Tensor
    key_length: int
    block_size: int
    offset: int

    def __post_init__(self) -> None:
        blocks: Any = self.blocks
        if not isinstance(blocks, Tensor) or blocks.dtype is not torch.int32:
            found = f"a {blocks.dtype} tensor" if isinstance(blocks, Tensor) else type(blocks).__name__
            raise TypeError(f"blocks must be a torch.int32 tensor, got {found}")
        if self.block_size < 1 or self.key_length < 0:
            raise ValueError(
                "block_size must be at least 1 and key_length at least 0, got "
                f"block_size={self.block_size}, key_length={self.key_length}"
            )
        columns = self._num_key_blocks
        if blocks.dim() != 4 or not min(columns, 1) <= blocks.shape[3] <= columns:
            raise ValueError(
                f"blocks must have the shape (B, H, Lq, W) with W from {min(columns, 1)} to {columns} for "
                f"key_length={self.key_length} and block_size={self.block_size}, got {tuple(blocks.shape)}"
            )

    @property
    def _num_key_blocks(self) -> int:
        return (self.key_length + self.block_size - 1) // self.block_size

    def block_mask(self) -> Tensor:
        """Return the selection as a mask of blocks.

        Returns
        -------
        Tensor
            bool of shape `(B, H, Lq, nk)` with `nk = ceil(key_length / block_size)`, True where the block is selected.
        """
        columns = self._num_key_blocks
        # One more column takes the places that are not used.
        mask = self.blocks.new_zeros((*self.blocks.shape[:3], columns + 1), dtype=torch.bool)
        return mask.scatter(-1, self.blocks.long() % (columns + 1), True)[..., :columns]

    @property
    def num_blocks(self) -> Tensor:
        """Number of selected blocks of each token: int64 of shape `(B, H, Lq)`."""
        return (self.blocks >= 0).sum(-1)
