"""The power spectrum of attention along positions, and what is read from it."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ._arguments import choice
from ._arrays import Floats, floats, ratio, steps

__all__ = ["Spectrum", "band_shares", "frequency_selectivity", "power_spectral_density"]


class Spectrum(NamedTuple):
    """A one-sided power spectrum."""

    frequency: Floats
    """`(F,)`, in cycles per token: `k / nfft` for `k = 0 .. nfft // 2`."""
    power: Floats
    """`(..., F)`: `|F a|^2`, not doubled for the frequencies that the other side repeats."""


def power_spectral_density(
    signals: ArrayLike, *, window: str | None = "hann", nfft: int | None = None, demean: bool = False
) -> Spectrum:
    """Return `P(w) = |sum_t h(t) a(t) exp(-2 pi i w t)|^2`: equation 1 of the paper.

    Parameters
    ----------
    signals : array
        `(..., N)`: signals over positions.
    window : {"hann", None}, default "hann"
        The window `h`: Hann's, periodic, `(1 - cos(2 pi t / N)) / 2`, as in the paper; or none. Hann's window is 0 at
        position 0, so it removes what attention a head pays to the first token.
    nfft : int, optional
        To what length signals are padded with zeros, after the window; by default not at all. The paper pads, and does
        not say how far.
    demean : bool, default False
        Whether to subtract the mean first. Without it the frequency 0 has most of the power, since weights are not
        negative; the paper does not mention it.

    Returns
    -------
    Spectrum
        Frequencies and powers, float64.

    Raises
    ------
    ValueError
        If `window` is another one, or `nfft` is less than `N`.
    """
    a = floats("signals", signals)
    choice("window", window, ("hann", None))
    length = a.shape[-1]
    size = length if nfft is None else nfft
    if size < length:
        raise ValueError(f"nfft must be at least the length of the signals, {length}, got {nfft}")
    if demean:
        a = a - a.mean(-1, keepdims=True)
    if window == "hann":
        a = a * (0.5 - 0.5 * np.cos(2.0 * np.pi * steps(length) / length))
    transformed = np.fft.rfft(a, size)
    power = transformed.real**2 + transformed.imag**2
    return Spectrum(steps(power.shape[-1]) / size, power)


def band_shares(spectrum: Spectrum, *, edges: tuple[float, ...] = (0.25, 0.75)) -> Floats:
    """Return the shares of the power in bands of frequency: equation 2 of the paper.

    Parameters
    ----------
    spectrum : Spectrum
        Of the signals.
    edges : tuple of float, default (0.25, 0.75)
        The ends of all bands but the last, ascending, as shares of the Nyquist frequency of half a cycle per token. A
        band contains its upper end. The default is the paper's: low `[0, 1/8]`, mid `(1/8, 3/8]` and high `(3/8, 1/2]`
        cycles per token.

    Returns
    -------
    array
        float64 `(..., len(edges) + 1)`, summing to 1. NaN where there is no power.

    Raises
    ------
    ValueError
        If the edges do not ascend within 0 and 1.
    """
    bounds = (0.0, *edges, 1.0)
    if any(upper <= lower for lower, upper in itertools.pairwise(bounds)):
        raise ValueError(f"edges must ascend and lie between 0 and 1, got {edges}")
    band = np.searchsorted(np.asarray(edges), 2.0 * spectrum.frequency, side="left")
    sums = [spectrum.power[..., band == i].sum(-1) for i in range(len(edges) + 1)]
    return ratio(np.stack(sums, -1), spectrum.power.sum(-1)[..., None])


def frequency_selectivity(spectrum: Spectrum) -> Floats:
    """Return the largest power over the sum of all others: equation 3 of the paper.

    Parameters
    ----------
    spectrum : Spectrum
        Of the signals.

    Returns
    -------
    array
        float64 `(...)`; infinite where one frequency has all power, NaN where there is none.

    Notes
    -----
    A peak is one bin, so the number depends on `nfft`: zero padding spreads a peak over several bins.
    """
    peak = spectrum.power.argmax(-1)[..., None]
    rest = np.array(spectrum.power)
    np.put_along_axis(rest, peak, 0.0, -1)
    return ratio(spectrum.power.max(-1), rest.sum(-1))
