"""The memory of a cache of keys and values, and the averages of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _causal_cpu
from ._descriptors import describe


class Memory:
    """Keys, values and the averages of their complete blocks, for sequences of at most `capacity` tokens."""

    def __init__(
        self,
        batch_size: int,
        heads: int,
        head_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        block_size: int,
        capacity: int,
    ) -> None:
        average = torch.float64 if dtype is torch.float64 else torch.float32
        # The last block may be one that can never be complete.
        blocks = (capacity + block_size - 1) // block_size
        self.capacity, self.block_size, self.dtype = capacity, block_size, dtype
        # Tensors that are made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.key = torch.empty(batch_size, heads, capacity, head_dim, dtype=dtype)
            self.value = torch.empty(batch_size, heads, capacity, value_dim, dtype=dtype)
            self.key_means = torch.empty(batch_size, heads, blocks, head_dim, dtype=average)
            self.value_means = torch.empty(batch_size, heads, blocks, value_dim, dtype=average)
        self.pooled = [0] * batch_size  # blocks of each sequence whose averages are there
        self._describe()

    def _describe(self) -> None:
        # They stay the same as long as the memory, so a step need not make them again.
        self.descriptors = tuple(describe(x) for x in (self.key, self.value, self.key_means, self.value_means))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._describe()  # a copy has addresses of its own

    def write(self, key: Tensor, value: Tensor, before: list[int], after: list[int]) -> None:
        """Store the tokens from `before` to `after` of each sequence, the first ones of `key` and `value`."""
        start, end = before[0], after[0]
        if before.count(start) == after.count(end) == len(after):
            if end - start < key.shape[2]:
                key, value = key[:, :, : end - start], value[:, :, : end - start]
            self.key.narrow(2, start, end - start).copy_(key)
            self.value.narrow(2, start, end - start).copy_(value)
        else:
            for item, (start, end) in enumerate(zip(before, after, strict=True)):
                self.key[item, :, start:end].copy_(key[item, :, : end - start])
                self.value[item, :, start:end].copy_(value[item, :, : end - start])
        self._pool(after)

    def _pool(self, lengths: list[int]) -> None:
        """Average the blocks that have become complete."""
        complete = [length // self.block_size for length in lengths]
        if complete == self.pooled:
            return
        first, last = self.pooled[0], complete[0]
        if self.pooled.count(first) == complete.count(last) == len(complete):
            self._pool_blocks(slice(None), first, last)
        else:
            for item, (first, last) in enumerate(zip(self.pooled, complete, strict=True)):
                if first < last:
                    self._pool_blocks(slice(item, item + 1), first, last)
        self.pooled = complete

    def _pool_blocks(self, items: slice, first: int, last: int) -> None:
        size = self.block_size
        for tokens, means in ((self.key, self.key_means), (self.value, self.value_means)):
            _causal_cpu.pool(tokens[items, :, first * size : last * size], means[items, :, first:last], size)

    def crop(self, lengths: list[int]) -> None:
        """Forget the averages of blocks that are no longer complete."""
        self.pooled = [min(n, m // self.block_size) for n, m in zip(self.pooled, lengths, strict=True)]

    def copy(self, indices: Sequence[int], capacity: int, lengths: Sequence[int]) -> Memory:
        """Return a new memory whose sequence `i` is `indices[i]` of this one; `lengths` are those of this one."""
        _, heads, _, head_dim = self.key.shape
        new = Memory(len(indices), heads, head_dim, self.value.shape[3], self.dtype, self.block_size, capacity)
        new.pooled = [self.pooled[index] for index in indices]
        for source, target, used in (
            (self.key, new.key, lengths),
            (self.value, new.value, lengths),
            (self.key_means, new.key_means, self.pooled),
            (self.value_means, new.value_means, self.pooled),
        ):
            for item, index in enumerate(indices):
                target[item, :, : used[index]].copy_(source[index, :, : used[index]])
        return new
