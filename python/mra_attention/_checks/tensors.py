"""Which tensors the public functions take: types, dtypes, layouts, devices."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_inputs(tensors: tuple[Any, ...], plain: bool = False) -> None:
    """Check types, dtypes, layouts and devices of query, key and, if given, value; of plain tensors dtypes alone."""
    dtype = tensors[0].dtype if isinstance(tensors[0], Tensor) else None
    valid = dtype in FLOAT_DTYPES
    if plain and valid and tensors[1].dtype is dtype and tensors[-1].dtype is dtype:
        return
    for tensor in tensors:
        if not (
            valid
            and isinstance(tensor, Tensor)
            and tensor.dtype is dtype
            and tensor.is_cpu
            and tensor.layout is torch.strided
            and not tensor.is_nested
        ):
            _explain_inputs(tensors)


def _explain_inputs(tensors: tuple[Any, ...]) -> NoReturn:
    names = ("query", "key", "value")[: len(tensors)]
    named = list(zip(names, tensors, strict=True))
    for name, tensor in named:
        check_dense(name, tensor)
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be a float32, float64, bfloat16 or float16 tensor, got {tensor.dtype}")
    joined = ", ".join(names[:-1]) + " and " + names[-1]
    devices = [tensor.device for tensor in tensors]
    if any(device != devices[0] for device in devices):
        raise ValueError(f"{joined} must be on the same device, got {_listed(devices)}")
    for name, tensor in named:
        check_cpu(name, tensor)
    raise TypeError(
        f"{joined} must have the same dtype, got {_listed([tensor.dtype for tensor in tensors])}; "
        "convert them, or call under torch.autocast"
    )


def _listed(values: list[Any]) -> str:
    return ", ".join(str(value) for value in values)


def any_nested(query: Any, key: Any, value: Any) -> bool:
    """Return whether one of the arguments is a nested tensor."""
    return (
        (isinstance(query, Tensor) and query.is_nested)
        or (isinstance(key, Tensor) and key.is_nested)
        or (isinstance(value, Tensor) and value.is_nested)
    )


def check_dense(name: str, tensor: Any) -> None:
    """Check that an argument is an ordinary tensor: neither nested nor sparse."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise NotImplementedError(
            f"{name} is a nested tensor, which is not supported here: only query, key and value of "
            "scaled_dot_product_attention may be nested"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense (torch.strided) tensor, got layout {tensor.layout}")


def check_cpu(name: str, tensor: Tensor) -> None:
    """Check that a tensor is on the CPU."""
    if not tensor.is_cpu:
        raise NotImplementedError(f"{name} is on device {tensor.device}; only cpu is supported now, others later")


def check_bool_mask(name: str, mask: Any) -> None:
    """Check everything about a mask but its shape."""
    check_dense(name, mask)
    if mask.dtype is not torch.bool:
        raise TypeError(f"{name} must be a bool tensor (True takes part in attention), got {mask.dtype}")
    check_cpu(name, mask)
