"""Functions of torch that run backward, in which checkpointed layers call attention again."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

_torch: Any = torch
BACKWARD: tuple[Any, ...] = (_torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad)


def _never(*_: Any) -> bool:
    return False


def without_dispatch(function: Any) -> Callable[..., Any]:
    """Return a copy of one of these functions that does not ask the modes first.

    A mode is off while its `__torch_function__` runs, so the function itself would recompute layers with torch's
    attention; with the mode on it would only come back to the mode.
    """
    names = dict.fromkeys(("has_torch_function", "has_torch_function_unary"), _never)
    copy = types.FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__)
    copy.__defaults__, copy.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return copy
