"""The memory of a cache of keys and values, and the averages of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._native.descriptors import describe
from ._ops import cpu


class Memory:
    """Keys, values and the averages of their complete blocks, for sequences of at most `capacity` tokens.

    There are averages of the blocks of every size in `block_sizes`, the largest first.
    """

    def __init__(
        self,
        batch_size: int,
        heads: int,
        head_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        block_sizes: Sequence[int],
        capacity: int,
    ) -> None:
        average = torch.float64 if dtype is torch.float64 else torch.float32
        self.capacity, self.block_sizes, self.dtype = capacity, tuple(block_sizes), dtype
        # Tensors that are made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.key = torch.empty(batch_size, heads, capacity, head_dim, dtype=dtype, device="cpu")
            self.value = torch.empty(batch_size, heads, capacity, value_dim, dtype=dtype, device="cpu")
            self.key_means = self._empty_means(batch_size, heads, head_dim, average)
            self.value_means = self._empty_means(batch_size, heads, value_dim, average)
        self._describe()

    def _empty_means(self, batch_size: int, heads: int, channels: int, dtype: torch.dtype) -> list[Tensor]:
        # The last block may be one that can never be complete.
        counts = [(self.capacity + size - 1) // size for size in self.block_sizes]
        return [torch.empty(batch_size, heads, count, channels, dtype=dtype, device="cpu") for count in counts]

    def _describe(self) -> None:
        # They stay the same as long as the memory, so a step need not make them again.
        self.descriptors: cpu.Stored = (
            describe(self.key),
            describe(self.value),
            tuple(describe(means) for means in self.key_means),
            tuple(describe(means) for means in self.value_means),
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._describe()  # a copy has addresses of its own

    def append(self, key: Tensor, value: Tensor, before: Sequence[int], after: Sequence[int]) -> None:
        """Store the tokens from `before` to `after` of each sequence, the first ones of `key` and `value`."""
        cpu.append(key, value, self.descriptors, before, after, self.block_sizes)

    def copy(self, indices: Sequence[int], capacity: int, lengths: Sequence[int]) -> Memory:
        """Return a new memory whose sequence `i` is `indices[i]` of this one; `lengths` are those of this one."""
        _, heads, _, head_dim = self.key.shape
        new = Memory(len(indices), heads, head_dim, self.value.shape[3], self.dtype, self.block_sizes, capacity)
        copies = [(self.key, new.key, lengths), (self.value, new.value, lengths)]
        for level, size in enumerate(self.block_sizes):
            complete = [length // size for length in lengths]
            copies.append((self.key_means[level], new.key_means[level], complete))
            copies.append((self.value_means[level], new.value_means[level], complete))
        for source, target, used in copies:
            for item, index in enumerate(indices):
                target[item, :, : used[index]].copy_(source[index, :, : used[index]])
        return new
