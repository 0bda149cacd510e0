"""How much the wavelet transform of attention changes when only some of the tokens are there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ._arguments import choice
from ._arrays import Floats, Ints, floats, ratio, steps
from .wavelets import WaveletCoefficients, wavelet_coefficients, wavelet_energy

__all__ = ["scale_sensitivity"]


def scale_sensitivity(
    signals: ArrayLike, alpha: float, *, sampling: str = "prefix", compare: str = "energy", **transform: Any
) -> Floats:
    """Return `1 - cos(W(a), W(a_alpha))`, `a_alpha` being `floor(alpha N)` of the samples: equation 10 of the paper.

    Softmax over some of the keys is the softmax over all of them at these keys, divided by its sum, and a cosine does
    not see that factor. So this is what the same queries and keys give on the shorter sequence.

    Parameters
    ----------
    signals : array
        `(..., N)`: signals over positions.
    alpha : float
        The share of the samples that is kept, above 0 and at most 1; the paper has 0.5 and 0.25.
    sampling : {"prefix", "stride"}, default "prefix"
        Whether the samples are the first ones, or evenly spaced over all. The paper does not say.
    compare : {"energy", "truncate", "resample"}, default "energy"
        How transforms of two lengths are compared, which the paper does not say either. "energy": the energies of the
        scales, one number for each. "truncate": as many coefficients of each scale as the shorter one has, from the
        beginning. "resample": all coefficients, those of the longer one interpolated linearly to the places of the
        shorter one.
    **transform
        Arguments of `wavelet_coefficients`. The level is that of the shorter signal unless it is given.

    Returns
    -------
    array
        float64 `(...)`, from 0 to 2, with "energy" to 1. NaN where one of the transforms is 0, as where a head sees
        none of the first tokens.

    Raises
    ------
    ImportError
        If PyWavelets is not installed.
    ValueError
        If an argument is not accepted, or no sample is left.
    """
    a = floats("signals", signals)
    choice("sampling", sampling, ("prefix", "stride"))
    choice("compare", compare, ("energy", "truncate", "resample"))
    length = a.shape[-1]
    kept = math.floor(alpha * length) if 0.0 < alpha <= 1.0 else 0
    if kept < 1:
        raise ValueError(f"alpha must be above 0, at most 1, and leave one of {length} samples; got {alpha}")
    places = np.arange(kept) if sampling == "prefix" else np.arange(kept) * length // kept
    # Of a head that looks elsewhere these samples may be so small that squares of energies would vanish.
    short = wavelet_coefficients(_of_size_one(a[..., places]), **transform)
    of_whole: dict[str, Any] = transform | {"level": len(short.scales) - 1}
    whole = wavelet_coefficients(a, **of_whole)
    return 1.0 - _cosine(*_comparable(whole, short, compare))


def _of_size_one(x: Floats) -> Floats:
    return ratio(x, np.abs(x).max(-1, keepdims=True))


def _comparable(whole: WaveletCoefficients, short: WaveletCoefficients, compare: str) -> tuple[Floats, Floats]:
    if compare == "energy":
        return wavelet_energy(whole), wavelet_energy(short)
    fit = _first if compare == "truncate" else _resampled
    fitted = [fit(long, few.shape[-1]) for long, few in zip(whole.scales, short.scales, strict=True)]
    return np.concatenate(fitted, -1), np.concatenate(short.scales, -1)


def _first(x: Floats, size: int) -> Floats:
    return x[..., :size]


def _resampled(x: Floats, size: int) -> Floats:
    last = x.shape[-1] - 1
    place = steps(size) * (last / max(size - 1, 1))
    below: Ints = np.minimum(place.astype(np.int64), last)
    above = np.minimum(below + 1, last)
    share = place - below
    return (1.0 - share) * x[..., below] + share * x[..., above]


def _cosine(x: Floats, y: Floats) -> Floats:
    return ratio((x * y).sum(-1), np.sqrt((x * x).sum(-1)) * np.sqrt((y * y).sum(-1)))
