"""The entropic uncertainty principle, for attention as the squares of amplitudes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ._arrays import Floats, normalized, weights
from .entropies import entropy

__all__ = ["EntropicUncertainty", "entropic_uncertainty"]


class EntropicUncertainty(NamedTuple):
    """Entropies of a position and of a frequency, in nats."""

    position: Floats
    """`(...)`: `H(a)`."""
    frequency: Floats
    """`(...)`: `H(|F psi|^2)`."""
    bound: float
    """`log N`: no signal has a smaller sum."""
    slack: Floats
    """`(...)`: the sum less the bound, not negative but for roundoff."""


def entropic_uncertainty(rows: ArrayLike) -> EntropicUncertainty:
    """Return the sides of `H(a) + H(|F psi|^2) >= log N`, with `psi = sqrt(a)` and the unitary Fourier transform `F`.

    Attention weights are the probabilities of the positions of a state `psi`, and `|F psi|^2` those of its `N`
    frequencies. For them there is a bound that every state meets, which there is not for `spectral_entropy`: that one
    is of the spectrum of `a` itself, of one side of it, with a window.

    Parameters
    ----------
    rows : array
        `(..., N)`: attention weights, not negative. Rows are divided by their sums.

    Returns
    -------
    EntropicUncertainty
        Entropies, bound and slack. The slack is 0 for one position, for uniform rows, and for combs of evenly spaced
        equal weights whose spacing divides `N`. NaN for a row of zeros.

    Raises
    ------
    ValueError
        If a weight is negative.

    References
    ----------
    H. Maassen and J. B. M. Uffink, "Generalized entropic uncertainty relations", Phys. Rev. Lett. 60 (1988) 1103.
    """
    a = normalized(weights("rows", rows))
    transformed = np.fft.fft(np.sqrt(a), norm="ortho")
    position = entropy(a)
    frequency = entropy(transformed.real**2 + transformed.imag**2)
    bound = float(np.log(a.shape[-1]))
    return EntropicUncertainty(position, frequency, bound, position + frequency - bound)
