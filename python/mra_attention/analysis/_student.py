"""Quantiles of Student's t distribution, which torch does not have."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_STEPS = 1024


def student_quantile(confidence: float, degrees: Tensor) -> Tensor:
    """Return what |t| exceeds with probability `1 - confidence`, for degrees of freedom of 1 and more, in float64.

    With `t = sqrt(degrees) tan(angle)` the density is `cos(angle) ** (degrees - 1)`: smooth, and on a finite interval.
    """
    # For many degrees of freedom the density is narrow; 12 / sqrt(degrees) holds all of it.
    ends = (12.0 / degrees.double().sqrt()).clamp(max=math.pi / 2)[..., None]
    steps = (torch.arange(_STEPS, dtype=torch.float64) + 0.5) / _STEPS
    density = (ends * steps).cos() ** (degrees.double()[..., None] - 1.0)
    shares = density.cumsum(-1)
    shares = shares / shares[..., -1:]
    at = torch.searchsorted(shares, torch.full_like(ends, confidence)).clamp(max=_STEPS - 1)
    above = shares.gather(-1, at)
    below = torch.where(at > 0, shares.gather(-1, (at - 1).clamp(min=0)), 0.0)
    angle = ends * (at + (confidence - below) / (above - below)) / _STEPS
    return degrees.double().sqrt() * angle[..., 0].tan()
