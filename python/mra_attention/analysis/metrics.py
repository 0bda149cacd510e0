"""The metrics that `analyze` knows: what each computes of the samples of a head, and how samples become a number.

A sample is a signal of the head in one sequence. The functions that compute are in modules of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from . import entropies, locality, sensitivity, spectra, uncertainty, wavelets
from ._arrays import Floats, normalized
from .heads import HeadRows

Options = Mapping[str, Mapping[str, Any]]
Samples = dict[str, Floats]

ALPHAS = (0.5, 0.25)
WINDOWS = (16, 32, 64)

CONFIGURABLE: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        spectra.power_spectral_density,
        spectra.band_shares,
        wavelets.wavelet_coefficients,
        wavelets.wavelet_energy,
        sensitivity.scale_sensitivity,
        locality.local_share,
        locality.window_entropy,
    )
}
"""The functions of which `options` may set keyword arguments."""


def check_options(options: Options) -> None:
    """Check that options are keyword arguments of functions that take them.

    Raises
    ------
    ValueError
        If a function or an argument is unknown.
    """
    for name, given in options.items():
        if name not in CONFIGURABLE:
            raise ValueError(f"options has {name!r}, which is none of {', '.join(CONFIGURABLE)}")
        parameters = inspect.signature(CONFIGURABLE[name]).parameters.values()
        accepted = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"visible"}
        for unknown in given.keys() - accepted:
            raise ValueError(f"options[{name!r}] has {unknown!r}, which is none of {', '.join(sorted(accepted))}")


class HeadSamples:
    """Rows of a head in one sequence, and what several metrics have in common."""

    def __init__(self, rows: HeadRows, reduction: str, options: Options) -> None:
        self.weights = normalized(rows.weights)
        self.visible, self.positions = rows.visible, rows.positions
        self._reduction = reduction
        self._options = options

    def options(self, function: str) -> dict[str, Any]:
        """Return the keyword arguments of a function."""
        return {**self._options.get(function, {})}

    @cached_property
    def signals(self) -> Floats:
        """`(S, N)`."""
        if self._reduction == "each":
            return self.weights
        return self.weights[-1:] if self._reduction == "last" else self.weights.mean(0, keepdims=True)

    @cached_property
    def spectrum(self) -> spectra.Spectrum:
        """Of the signals."""
        return spectra.power_spectral_density(self.signals, **self.options("power_spectral_density"))

    @cached_property
    def coefficients(self) -> wavelets.WaveletCoefficients:
        """Of the signals."""
        return wavelets.wavelet_coefficients(self.signals, **self.options("wavelet_coefficients"))

    @cached_property
    def entropies(self) -> Samples:
        """Of the signals and of their spectrum."""
        return {
            "positional_entropy": entropies.positional_entropy(self.signals),
            "spectral_entropy": entropies.spectral_entropy(self.spectrum.power),
        }

    def by_scale(self, name: str, values: Floats) -> Samples:
        """Name `(S, scales)` by metric and scale."""
        return {f"{name}_{scale}": values[:, i] for i, scale in enumerate(self.coefficients.names)}


def mean(samples: Floats) -> float:
    """Return the mean of the samples that are defined; NaN if none is."""
    known = samples[~np.isnan(samples)]
    return float(known.mean()) if known.size else float("nan")


def _means(samples: Samples) -> dict[str, float]:
    return {name: mean(values) for name, values in samples.items()}


class Metric(NamedTuple):
    """How a metric is computed."""

    of_samples: Callable[[HeadSamples], Samples]
    combine: Callable[[Samples], dict[str, float]] = _means
    """What becomes of the samples of all sequences."""


def _band_shares(x: HeadSamples) -> Samples:
    shares = spectra.band_shares(x.spectrum, **x.options("band_shares"))
    count = shares.shape[-1]
    names = ("low", "mid", "high") if count == 3 else tuple(f"band_{i}" for i in range(count))
    return {f"{name}_share": shares[:, i] for i, name in enumerate(names)}


def _entropies(x: HeadSamples) -> Samples:
    return x.entropies


def _correlation(samples: Samples) -> dict[str, float]:
    return {"entropy_correlation": entropies.entropy_correlation(*samples.values())}


def _wavelet_energy(x: HeadSamples) -> Samples:
    energy = wavelets.wavelet_energy(x.coefficients, **x.options("wavelet_energy"))
    return x.by_scale("wavelet_energy", energy)


def _wavelet_entropy(x: HeadSamples) -> Samples:
    plain = x.by_scale("wavelet_entropy", wavelets.wavelet_entropy(x.coefficients))
    return plain | x.by_scale("normalized_wavelet_entropy", wavelets.wavelet_entropy(x.coefficients, normalize=True))


def _sensitivity(x: HeadSamples) -> Samples:
    given = x.options("scale_sensitivity") | x.options("wavelet_coefficients")
    count, length = x.signals.shape
    return {
        f"scale_sensitivity_{alpha}": sensitivity.scale_sensitivity(x.signals, alpha, **given)
        if alpha * length >= 1.0
        else np.full(count, np.nan)
        for alpha in ALPHAS
    }


def _local_share(x: HeadSamples) -> Samples:
    return {"local_share": locality.local_share(x.weights, x.positions, **x.options("local_share"))}


def _local_global(samples: Samples) -> dict[str, float]:
    share = mean(samples["local_share"])
    return {"local_share": share, "local_global_ratio": float("inf") if share == 1.0 else share / (1.0 - share)}


def _window_entropy(x: HeadSamples) -> Samples:
    given = x.options("window_entropy")
    return {
        f"window_entropy_{size}": locality.window_entropy(x.weights, size, visible=x.visible, **given)
        for size in WINDOWS
    }


def _uncertainty(x: HeadSamples) -> Samples:
    found = uncertainty.entropic_uncertainty(x.signals)
    return {"uncertainty_frequency_entropy": found.frequency, "uncertainty_slack": found.slack}


def _selectivity(x: HeadSamples) -> Samples:
    return {"frequency_selectivity": spectra.frequency_selectivity(x.spectrum)}


def _reconstruction(x: HeadSamples) -> Samples:
    return {"reconstruction_error": wavelets.reconstruction_error(x.signals, x.coefficients)}


METRICS = {
    "band_shares": Metric(_band_shares),
    "frequency_selectivity": Metric(_selectivity),
    "entropies": Metric(_entropies),
    "entropy_correlation": Metric(_entropies, _correlation),
    "wavelet_energy": Metric(_wavelet_energy),
    "wavelet_entropy": Metric(_wavelet_entropy),
    "scale_sensitivity": Metric(_sensitivity),
    "reconstruction_error": Metric(_reconstruction),
    "local_global_ratio": Metric(_local_share, _local_global),
    "window_entropy": Metric(_window_entropy),
    "entropic_uncertainty": Metric(_uncertainty),
}
