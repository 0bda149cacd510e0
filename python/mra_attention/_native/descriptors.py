"""Tensors as the native module reads them: address, sizes, strides, dtype."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from . import threads as _threads  # noqa: F401  # pyright: ignore[reportUnusedImport]  importing it chooses the threads

_DTYPE_CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.bool: 4,
    torch.uint8: 4,
    torch.int32: 5,
}

Descriptor: TypeAlias = tuple[int, torch.Size, tuple[int, ...], int, Tensor]


def rows(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or a copy if the elements of its rows are not adjacent."""
    if tensor.is_contiguous() or tensor.stride(-1) == 1 or tensor.shape[-1] <= 1:
        return tensor
    return tensor.contiguous()


def describe(tensor: Tensor) -> Descriptor:
    """Return what the native module reads.

    The tensor goes along, and so is alive during the call. That a caller has it in a variable would not do: where
    Dynamo has split a function, a variable that is not read again ends at the split.
    """
    code = _DTYPE_CODES.get(tensor.dtype)
    if code is None:
        raise TypeError(f"mra_attention has no kernel for {tensor.dtype}; accepted: {list(_DTYPE_CODES)}")
    return tensor.data_ptr(), tensor.shape, tensor.stride(), code, tensor


def describe_optional(tensor: Tensor | None) -> Descriptor | None:
    """Return what the native module reads of an argument that may be left out."""
    return None if tensor is None else describe(tensor)
