"""What the metrics are of signals that no model made: what follows from their definitions alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from mra_attention import analysis

from .statistics import Floats

LENGTH = 512
DRAWS = 200
SEED = 0


@dataclass
class Signal:
    """Metrics of a signal, or means over draws of it."""

    name: str
    low_share: float
    mid_share: float
    high_share: float
    frequency_selectivity: float
    spectral_entropy: float
    positional_entropy: float
    entropy_correlation: float
    uncertainty_slack: float
    reconstruction_error: float


def signals() -> list[Signal]:
    """Return the metrics of a peak, of blocks of equal weights, of plateaus of all widths, and of noise."""
    generator = np.random.default_rng(SEED)
    places = np.arange(LENGTH)
    middle = LENGTH // 2
    widths = generator.integers(1, LENGTH + 1, DRAWS)
    starts = (generator.random(DRAWS) * (LENGTH - widths + 1)).astype(np.int64)
    shapes: dict[str, Floats] = {
        "one position": 1.0 * (places == middle)[None],
        "32 neighbours": 1.0 * (abs(places - middle) < 16)[None],
        "all positions": np.ones((1, LENGTH)),
        "plateaus of random widths": 1.0 * ((places >= starts[:, None]) & (places < (starts + widths)[:, None])),
        "noise, exponential": generator.exponential(size=(DRAWS, LENGTH)),
        "noise, its fourth power": generator.exponential(size=(DRAWS, LENGTH)) ** 4,
    }
    return [_signal(name, shape) for name, shape in shapes.items()]


def _signal(name: str, shape: Floats) -> Signal:
    rows = shape / shape.sum(-1, keepdims=True)
    spectrum = analysis.power_spectral_density(rows)
    positional, spectral = analysis.positional_entropy(rows), analysis.spectral_entropy(spectrum.power)
    numbers = (
        *analysis.band_shares(spectrum).mean(0),
        analysis.frequency_selectivity(spectrum).mean(),
        spectral.mean(),
        positional.mean(),
        analysis.entropy_correlation(positional, spectral),
        analysis.entropic_uncertainty(rows).slack.mean(),
        analysis.reconstruction_error(rows, analysis.wavelet_coefficients(rows)).mean(),
    )
    return Signal(name, *map(float, numbers))
