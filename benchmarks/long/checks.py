"""What is timed must be right."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from mra_attention import KVCache
from mra_attention import scaled_dot_product_attention as mra

from ..speed.checks import relative_error
from .heads import heads

LENGTH = 2048
TOLERANCE = 1e-5
"""Relative error in float32 against float64 of the same formulas."""


def check_ladder(*, causal: bool) -> None:
    """Compare a ladder that refines everything with SDPA in float64, forward and backward.

    Raises
    ------
    AssertionError
        If an error is above the tolerance.
    """
    made = heads(LENGTH)
    grad_out = torch.randn(made[0].shape, generator=torch.Generator().manual_seed(2))

    def run(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in made]
        if dtype is torch.float64:
            out = F.scaled_dot_product_attention(*leaves, is_causal=causal)
        else:
            out = mra(*leaves, is_causal=causal, resolutions=(512, 32, 1), blocks_per_row=math.inf)
        return (out, *torch.autograd.grad(out, leaves, grad_out.to(dtype)))

    for name, actual, expected in zip(("out", "dq", "dk", "dv"), run(torch.float32), run(torch.float64), strict=True):
        error = relative_error(actual, expected)
        if not error <= TOLERANCE:
            raise AssertionError(f"{name} of a ladder that refines everything: error {error:.1e} > {TOLERANCE:.1e}")


def check_decoding(keywords: Mapping[str, Any]) -> None:
    """Compare a step of a cache with the same row of the whole sequence.

    Raises
    ------
    AssertionError
        If an error is above the tolerance.
    """
    query, key, value = heads(LENGTH)
    cache = KVCache(1, query.shape[1], query.shape[3], max_length=LENGTH, **keywords)
    cache.append(key, value)
    step = cache.attend(query[:, :, -1:])
    error = relative_error(step, mra(query, key, value, is_causal=True, **keywords)[:, :, -1:])
    if not error <= TOLERANCE:
        raise AssertionError(f"a step of decoding, {keywords}: error {error:.1e} > {TOLERANCE:.1e}")
