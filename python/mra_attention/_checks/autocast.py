"""What `torch.autocast` does to inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def autocast(inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Cast the inputs as autocast casts those of torch's own attention: every CPU float but float64."""
    dtype = torch.get_autocast_dtype("cpu")
    return tuple(
        tensor.to(dtype)
        if isinstance(tensor, Tensor) and tensor.is_cpu and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in inputs
    )
