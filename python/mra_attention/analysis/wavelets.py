"""Discrete wavelet transforms of attention along positions. PyWavelets does them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ._arrays import ROUNDOFF, Floats, floats, normalized, ratio
from ._extra import require
from .entropies import entropy

__all__ = ["WaveletCoefficients", "reconstruction_error", "wavelet_coefficients", "wavelet_energy", "wavelet_entropy"]

PAPER_LEVEL = 5
"""The paper's tables have six scales: the approximation, and the details of five levels."""


class WaveletCoefficients(NamedTuple):
    """A multilevel transform."""

    scales: list[Floats]
    """`(..., n)` each: the approximation of the last level, then the details from the last level to the first."""
    wavelet: str
    mode: str

    @property
    def names(self) -> list[str]:
        """Names of the scales: `a5`, `d5`, ..., `d1`. `d1` has the finest details, of two neighbouring tokens."""
        level = len(self.scales) - 1
        return [f"a{level}", *(f"d{i}" for i in range(level, 0, -1))]


def _pywavelets() -> Any:
    return require("pywt", "PyWavelets", "a wavelet transform")


def wavelet_coefficients(
    signals: ArrayLike, *, wavelet: str = "db2", level: int | None = None, mode: str = "periodization"
) -> WaveletCoefficients:
    """Return the discrete wavelet transform of signals: equation 4 of the paper.

    Parameters
    ----------
    signals : array
        `(..., N)`: signals over positions.
    wavelet : str, default "db2"
        An orthogonal or biorthogonal wavelet of PyWavelets. Daubechies' second is the paper's.
    level : int, optional
        How many levels. By default the paper's 5, or as many as the length allows where it is short: those at which a
        coefficient is not of the ends alone (`pywt.dwt_max_level`). The paper takes one "suitable for the shortest
        sequence".
    mode : str, default "periodization"
        How PyWavelets extends signals beyond their ends. The paper does not say. This one makes the transform
        orthonormal where the wavelet is orthogonal and `2**level` divides `N`: energies then add up to that of the
        signal. PyWavelets' own default is "symmetric", which has more coefficients than samples.

    Returns
    -------
    WaveletCoefficients
        Coefficients, float64.

    Raises
    ------
    ImportError
        If PyWavelets is not installed.
    ValueError
        If there is no such wavelet or mode, or `level` is negative or too large for the length.
    """
    pywt = _pywavelets()
    a = floats("signals", signals)
    basis = pywt.Wavelet(wavelet)
    deepest = int(pywt.dwt_max_level(a.shape[-1], basis.dec_len))
    used = min(PAPER_LEVEL, deepest) if level is None else level
    if not 0 <= used <= deepest:
        raise ValueError(f"level must be in 0 .. {deepest} for {a.shape[-1]} samples and {wavelet!r}, got {level}")
    return WaveletCoefficients(list(pywt.wavedec(a, basis, mode=mode, level=used, axis=-1)), wavelet, mode)


def wavelet_energy(coefficients: WaveletCoefficients, *, normalize: bool = False) -> Floats:
    """Return the sum of the squared coefficients of each scale.

    Parameters
    ----------
    coefficients : WaveletCoefficients
        Of the signals.
    normalize : bool, default False
        Whether to divide by the sum over all scales.

    Returns
    -------
    array
        float64 `(..., scales)`, in the order of `coefficients.names`. NaN where all energies are 0 and are to be
        normalized.
    """
    energy = np.stack([(scale**2).sum(-1) for scale in coefficients.scales], -1)
    return normalized(energy) if normalize else energy


def wavelet_entropy(coefficients: WaveletCoefficients, *, normalize: bool = False) -> Floats:
    """Return the entropy of the squared coefficients `W` of each scale: equation 5 of the paper.

    Parameters
    ----------
    coefficients : WaveletCoefficients
        Of the signals.
    normalize : bool, default False
        False: `-sum W^2 log W^2`, as the paper writes it; a scale with little energy then has little entropy, whatever
        its shape. True: the squares are divided by their sum over the scale first.

    Returns
    -------
    array
        float64 `(..., scales)`, in nats. With `normalize`, from 0 to the logarithm of the number of coefficients, and
        NaN for a scale whose coefficients are 0, or roundoff beside those of the others.
    """
    squares = [scale**2 for scale in coefficients.scales]
    if not normalize:
        return np.stack([entropy(x) for x in squares], -1)
    energy = wavelet_energy(coefficients)
    entropies = np.stack([entropy(normalized(x)) for x in squares], -1)
    return np.where(energy > ROUNDOFF**2 * energy.sum(-1, keepdims=True), entropies, np.nan)


def reconstruction_error(signals: ArrayLike, coefficients: WaveletCoefficients) -> Floats:
    """Return the norm of what the inverse transform misses, over the norm of the signal: equation 11 of the paper.

    Parameters
    ----------
    signals : array
        `(..., N)`: the signals.
    coefficients : WaveletCoefficients
        Their transform.

    Returns
    -------
    array
        float64 `(...)`; NaN for a signal of zeros.

    Raises
    ------
    ImportError
        If PyWavelets is not installed.

    Notes
    -----
    It says nothing about attention. A discrete wavelet transform has an exact inverse, so any signal, noise too, has an
    error of the size of the roundoff: about 1e-16 in float64, and the 1e-7 of the paper in float32.
    """
    a = floats("signals", signals)
    inverse = _pywavelets().waverec(coefficients.scales, coefficients.wavelet, mode=coefficients.mode, axis=-1)
    missed = np.asarray(inverse[..., : a.shape[-1]] - a, dtype=np.float64)
    return ratio(np.sqrt((missed**2).sum(-1)), np.sqrt((a**2).sum(-1)))
