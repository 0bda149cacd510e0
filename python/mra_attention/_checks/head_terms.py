"""Numbers that each head has: slopes of a bias by distance, sinks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .tensors import check_cpu, check_dense


def check(name: str, given: Any, batch: int, heads: int) -> Tensor | None:
    """Check a floating point tensor `(H,)` and bring it to float64 `(B, H)`, differentiably."""
    if given is None:
        return None
    check_dense(name, given)
    if not given.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, one number for each head of query, got {given.dtype}")
    check_cpu(name, given)
    if tuple(given.shape) != (heads,):
        raise ValueError(
            f"{name} must have the shape ({heads},), one number for each head of query, got {tuple(given.shape)}"
        )
    return given.to(torch.float64).expand(batch, heads)


def refuse_gradient_of_slopes(slopes: Any) -> None:
    """Raise if the slopes are to be learned."""
    if slopes is not None and slopes.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            "alibi_slopes requires a gradient, and mra_attention computes none for it; pass alibi_slopes.detach(), or "
            "the bias itself as attn_mask"
        )
