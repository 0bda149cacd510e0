"""One test for every argument, which names the argument, its value and what would be accepted.

A wrong type raises TypeError, a wrong value ValueError, and what is to come NotImplementedError. Each test begins with
the cheapest condition that a valid call meets; only a call that fails it pays for finding out why.
"""

from __future__ import annotations

import itertools
import math
import numbers
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from ._plan import Plan

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 8, 128


# Tensors


def check_inputs(*tensors: Any) -> None:
    """Check types, dtypes, layouts and devices of query, key and, if given, value."""
    dtype = tensors[0].dtype if isinstance(tensors[0], Tensor) else None
    valid = dtype in FLOAT_DTYPES
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


# Switches


def check_not_causal(local_blocks: int) -> None:
    """Check that no argument of causal attention comes with a call that is not causal."""
    if local_blocks != 1:
        raise ValueError(
            f"local_blocks={local_blocks!r} is for causal attention only (is_causal=True); use diagonal_blocks, or "
            "leave it at 1"
        )


def check_bool(name: str, value: Any) -> None:
    """Check that a switch is True or False."""
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, got {value!r}")


def dropout(dropout_p: Any) -> float:
    """Check `dropout_p`."""
    if type(dropout_p) is float and dropout_p == 0.0:
        return 0.0
    number = _as_float("dropout_p", dropout_p, "a number in [0, 1]")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"dropout_p must be a number in [0, 1], got {dropout_p!r}")
    return number


def is_sparse(mode: Any) -> bool:
    """Check `mode`."""
    if isinstance(mode, str):
        if mode == "full":
            return False
        if mode == "sparse":
            return True
        raise ValueError(f"mode must be 'full' or 'sparse', got {mode!r}")
    raise TypeError(f"mode must be the string 'full' or 'sparse', got {mode!r}")


# Numbers


def _as_float(name: str, value: Any, accepted: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {accepted}, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def scale_or_default(scale: Any, head_dim: int) -> float:
    """Check `scale` and put its default in its place."""
    if scale is None:
        return 1.0 / head_dim**0.5
    if isinstance(scale, torch.SymFloat):  # a float that is known later, while torch traces
        return scale  # pyright: ignore[reportReturnType]
    number = scale if type(scale) is float else _as_float("scale", scale, "None or a finite number")
    if not -math.inf < number < math.inf:
        raise ValueError(f"scale must be None or a finite number, got {scale!r}")
    return number


def positive_float(name: str, value: Any) -> float:
    """Check a number that is positive and finite."""
    number = value if type(value) is float else _as_float(name, value, "a positive, finite number")
    if not 0.0 < number < math.inf:
        raise ValueError(f"{name} must be a positive, finite number, got {value!r}")
    return number


def integer(name: str, value: Any, minimum: int) -> int:
    """Check a whole number that is not below a minimum."""
    number = value
    if type(value) is not int and not isinstance(value, torch.SymInt):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an integer of at least {minimum}, got {value!r}")
        number = int(value)
    if not minimum <= number < 2**63:
        raise ValueError(f"{name} must be an integer of at least {minimum} (and below 2**63), got {value!r}")
    return number


def block_size(resolutions: Any) -> int:
    """Check `resolutions` and return the block size."""
    if type(resolutions) is tuple and len(cast("tuple[Any, ...]", resolutions)) == 2:
        size, last = cast("tuple[Any, Any]", resolutions)
        if type(size) is int and type(last) is int and last == 1 and MIN_BLOCK_SIZE <= size <= MAX_BLOCK_SIZE:
            return size
    return _block_size_of_ladder(resolutions)


def _block_size_of_ladder(resolutions: Any) -> int:
    accepted = f"(block_size, 1) with {MIN_BLOCK_SIZE} <= block_size <= {MAX_BLOCK_SIZE}, for example (32, 1)"
    if not isinstance(resolutions, (tuple, list)):
        raise TypeError(f"resolutions must be a tuple of integers {accepted}; got {resolutions!r}")
    given = tuple(cast("tuple[Any, ...]", resolutions))
    for size in given:
        if isinstance(size, bool) or not isinstance(size, numbers.Integral):
            raise TypeError(f"resolutions must be a tuple of integers {accepted}; got {given!r}")
    sizes = [int(size) for size in given]
    if len(sizes) < 2 or sizes[-1] != 1:
        raise ValueError(f"resolutions must end in 1 and have at least two entries: {accepted}; got {given!r}")
    for larger, smaller in itertools.pairwise(sizes):
        if smaller < 1 or larger <= smaller or larger % smaller:
            raise ValueError(
                f"resolutions must decrease, each dividing the one before: {smaller} does not follow {larger} in "
                f"{given!r}; accepted now: {accepted}"
            )
    if len(sizes) > 2:
        raise NotImplementedError(f"resolutions={given!r}: more than two resolutions are for later; now: {accepted}")
    if not MIN_BLOCK_SIZE <= sizes[0] <= MAX_BLOCK_SIZE:
        raise ValueError(f"resolutions must be {accepted}; got {given!r}")
    return sizes[0]


# The plan


def plan_bits(plan: Any, query: Tensor, key: Tensor, size: int) -> Tensor:
    """Check that a plan was made for these 4-D inputs and this block size, and return its bits."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be None or a mra_attention.Plan, got {type(plan).__name__}")
    check_cpu("plan.bits", plan.bits)
    if plan.block_size != size:
        raise ValueError(
            f"plan was made with block_size={plan.block_size}, but the block size in resolutions is {size}; "
            f"pass resolutions=({plan.block_size}, 1) or make the plan anew"
        )
    made_for = (plan.bits.shape[0], plan.bits.shape[1], plan.query_length, plan.key_length)
    used_for = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if made_for != used_for:
        raise ValueError(
            "plan was made for other inputs: (batch, heads, query length, key length) is "
            f"{made_for} in the plan and {used_for} in query and key"
        )
    return plan.bits


def check_plan_alone(
    blocks_per_row: Any, num_blocks: Any, first_blocks: Any, diagonal_blocks: Any, local_blocks: Any
) -> None:
    """Check that no argument that asks for a selection comes with a plan, which is one."""
    for name, value, default in (
        ("blocks_per_row", blocks_per_row, 4.0),
        ("num_blocks", num_blocks, None),
        ("first_blocks", first_blocks, 0),
        ("diagonal_blocks", diagonal_blocks, 0),
        ("local_blocks", local_blocks, 1),
    ):
        if value is not default and value != default:
            raise ValueError(
                f"{name}={value!r} cannot be used together with plan: the plan already fixes the selection. "
                f"Leave {name} at {default!r}, or pass it to mra_attention.plan"
            )
