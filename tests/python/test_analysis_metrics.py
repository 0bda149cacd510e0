"""The metrics of attention, at signals of which the answer is known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from mra_attention import analysis as m

N = 64
EPS = np.finfo(np.float64).eps
ROUNDOFF = 8 * N * EPS
"""Of a sum of N products of numbers up to 1, each with a few roundings."""


def close(actual, expected, *, size: float = 1.0) -> None:
    """Equal up to the roundoff of sums whose terms are up to `size`; NaN where NaN is expected."""
    np.testing.assert_allclose(actual, expected, rtol=0.0, atol=ROUNDOFF * size)


def delta(place: int = 0, length: int = N) -> np.ndarray:
    return np.eye(length)[place]


def cosine(frequency: int, length: int = N) -> np.ndarray:
    return np.cos(2 * np.pi * frequency * np.arange(length) / length)


def plain(signals, **given):
    return m.power_spectral_density(signals, window=None, **given)


def test_spectrum_of_a_cosine_is_one_frequency():
    spectrum = plain(cosine(5))
    assert np.array_equal(spectrum.frequency, np.arange(N // 2 + 1) / N)
    close(spectrum.power, (N / 2) ** 2 * delta(5, N // 2 + 1), size=N**2)


def test_hann_window_spreads_it_over_three():
    expected = 16.0**2 * delta(5, 33) + 8.0**2 * (delta(4, 33) + delta(6, 33))
    close(m.power_spectral_density(cosine(5)).power, expected, size=N**2)
    assert not m.power_spectral_density(delta()).power.any(), "the window is 0 at the first token"


def test_spectrum_of_a_constant_is_its_mean():
    constant = np.full(N, 0.5)
    close(plain(constant).power, (N / 2) ** 2 * delta(0, 33), size=N**2)
    assert not plain(constant, demean=True).power.any()
    close(plain(0.3 + cosine(3), demean=True).power, plain(cosine(3)).power, size=N**2)


def test_zero_padding_and_parseval():
    signals = np.random.default_rng(0).random((2, 3, 50))
    t, k = np.arange(50), np.arange(41)
    expected = abs(signals @ np.exp(-2j * np.pi * np.outer(t, k) / 80)) ** 2
    spectrum = plain(signals, nfft=80)
    assert np.array_equal(spectrum.frequency, k / 80)
    close(spectrum.power, expected, size=N**2)
    power = plain(signals).power
    two_sided = power.sum(-1) + power[..., 1:25].sum(-1)
    close(two_sided, 50 * (signals**2).sum(-1), size=N**2)


def test_band_shares():
    close(m.band_shares(plain(delta())), [9 / 33, 16 / 33, 8 / 33])
    for frequency, band in ((0, 0), (8, 0), (9, 1), (24, 1), (25, 2), (32, 2)):
        close(m.band_shares(plain(cosine(frequency))), np.eye(3)[band])
    close(m.band_shares(plain(delta()), edges=(0.5,)), [17 / 33, 16 / 33])
    assert np.isnan(m.band_shares(plain(np.zeros((2, N))))).all()


def test_frequency_selectivity():
    close(m.frequency_selectivity(plain([delta(), delta(7)])), [1 / 32, 1 / 32])
    close(m.frequency_selectivity(plain(2 * cosine(3) + cosine(9))), 4.0, size=N)
    assert m.frequency_selectivity(plain([1.0, 1.0, 1.0, 1.0])) == math.inf
    assert np.isnan(m.frequency_selectivity(plain([0.0, 0.0])))


def test_entropies():
    uniform = np.full((2, N), 3.0)
    close(m.positional_entropy(uniform), np.log([N, N]))
    close(m.positional_entropy(uniform, base=2), [6.0, 6.0])
    assert (m.positional_entropy(np.eye(N)) == 0.0).all()
    close(m.positional_entropy([0.25, 0.25, 0.0], normalize=False), 0.5 * math.log(4))
    assert np.isnan(m.positional_entropy([[0.0, 0.0]])).all()
    triangle = np.tril(np.ones((N, N))) / np.arange(1, N + 1)[:, None]
    close(m.positional_entropy(triangle), np.log(np.arange(1, N + 1)))

    close(m.spectral_entropy(plain(delta()).power), math.log(33))
    close(m.spectral_entropy(plain(delta()).power, base=2), math.log2(33))
    close(m.spectral_entropy(plain(cosine(4) + cosine(9)).power), math.log(2))
    # A share x of power that is roundoff has an entropy of -x log x.
    close(m.spectral_entropy(plain(np.ones(N)).power), 0.0)
    assert np.isnan(m.spectral_entropy([0.0, 0.0]))


def test_entropy_correlation():
    assert m.entropy_correlation([1.0, 2.0, 3.0], [6.0, 4.0, 2.0]) == pytest.approx(-1.0, abs=8 * EPS)
    x, y = np.random.default_rng(0).random((2, 100))
    expected = np.corrcoef(x, y)[0, 1]
    assert m.entropy_correlation(x, y) == pytest.approx(expected, abs=800 * EPS)
    x[3] = np.nan
    kept = np.arange(100) != 3
    assert m.entropy_correlation(x, y) == pytest.approx(np.corrcoef(x[kept], y[kept])[0, 1], abs=800 * EPS)
    for constant in ([1.0, 1.0, 1.0], [1.0, 1.0 + EPS, 1.0]):
        assert math.isnan(m.entropy_correlation(constant, [1.0, 2.0, 3.0]))
    assert math.isnan(m.entropy_correlation([1.0], [1.0]))


def test_haar_wavelet_by_hand():
    """Half sums and differences: 1 2 3 4 has the means 3/sqrt 2 and 7/sqrt 2, then 5."""
    found = m.wavelet_coefficients([[1.0, 2.0, 3.0, 4.0]], wavelet="haar")
    assert found.names == ["a2", "d2", "d1"]
    for actual, expected in zip(found.scales, ([5.0], [-2.0], [-(0.5**0.5), -(0.5**0.5)]), strict=True):
        close(actual, [expected])
    close(m.wavelet_energy(found), [[25.0, 4.0, 1.0]], size=25)
    close(m.wavelet_energy(found, normalize=True), [[25 / 30, 4 / 30, 1 / 30]])
    close(m.wavelet_entropy(found), [[-25 * math.log(25), -4 * math.log(4), math.log(2)]], size=100)
    close(m.wavelet_entropy(found, normalize=True), [[0.0, 0.0, math.log(2)]])


def test_daubechies_wavelet():
    """db2 is orthonormal, and its details do not see a straight line."""
    signals = np.random.default_rng(0).random((3, N))
    energy = m.wavelet_energy(m.wavelet_coefficients(signals))
    assert energy.shape == (3, 5), "64 samples have 4 levels"
    close(energy.sum(-1), (signals**2).sum(-1), size=N)
    line = m.wavelet_coefficients(np.arange(N) / N, level=1)
    close(line.scales[1][1:-1], 0.0)
    root = math.sqrt(3)
    taps = np.array([1 + root, 3 + root, 3 - root, 1 - root]) / (4 * math.sqrt(2))
    places = (2 * np.arange(N // 2)[:, None] - 1 + np.arange(4)) % N
    close(m.wavelet_coefficients(signals, level=1).scales[0], signals[:, places] @ taps)


def test_arguments_of_the_transform():
    constant = np.ones(512)
    assert m.wavelet_coefficients(constant).names == ["a5", "d5", "d4", "d3", "d2", "d1"]
    assert m.wavelet_coefficients(constant, level=7).names[0] == "a7"
    assert m.wavelet_coefficients(constant, mode="symmetric").scales[-1].shape == (257,)
    assert m.wavelet_coefficients([1.0]).names == ["a0"]
    no_detail = m.wavelet_entropy(m.wavelet_coefficients(constant), normalize=True)
    assert np.isnan(no_detail[1:]).all(), "roundoff has no entropy"
    close(no_detail[0], math.log(16))


def test_reconstruction_error_is_roundoff_for_anything():
    signals = np.random.default_rng(0).standard_normal((4, 101))
    for given in ({}, {"mode": "symmetric"}, {"wavelet": "haar", "level": 3}):
        assert m.reconstruction_error(signals, m.wavelet_coefficients(signals, **given)).max() < ROUNDOFF
    lossy = m.wavelet_coefficients([1.0, 2.0, 3.0, 4.0], wavelet="haar")
    lossy.scales[-1][:] = 0.0
    close(m.reconstruction_error([1.0, 2.0, 3.0, 4.0], lossy), math.sqrt(1 / 30))
    assert np.isnan(m.reconstruction_error([0.0, 0.0], m.wavelet_coefficients([0.0, 0.0])))


def test_scale_sensitivity_by_hand():
    """With Haar: 1 0 1 1 has the approximations (1, 2)/sqrt 2 and the details (1, 0)/sqrt 2."""
    signal, haar = [1.0, 0.0, 1.0, 1.0], {"wavelet": "haar"}
    close(m.scale_sensitivity(np.ones(N), 0.25, **haar), 0.0)
    close(m.scale_sensitivity(signal, 1.0, **haar), 0.0)
    # The first two samples are 1 0, of energies 1/2 and 1/2 beside 5/2 and 1/2.
    close(m.scale_sensitivity(signal, 0.5, **haar), 1 - 1.5 / math.sqrt(6.5 * 0.5))
    close(m.scale_sensitivity([1e-120, 0.0, 1.0, 1.0], 0.5, **haar), 1 - 1 / math.sqrt(2))
    # Every second sample is 1 1, of energies 2 and 0.
    close(m.scale_sensitivity(signal, 0.5, sampling="stride", **haar), 1 - 2.5 / math.sqrt(6.5))
    close(m.scale_sensitivity(signal, 0.5, compare="truncate", **haar), 0.0)
    # Approximations 1, 2, 3, 4 and no details: the first two, and the first and the last, beside 1, 2.
    steps = [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0]
    close(m.scale_sensitivity(steps, 0.5, compare="truncate", level=1, **haar), 0.0)
    close(m.scale_sensitivity(steps, 0.5, compare="resample", level=1, **haar), 1 - 9 / math.sqrt(17 * 5))
    # Five approximations at the places of three: the first, the third and the fifth.
    steps = np.repeat([1.0, 5.0, 2.0, 7.0, 3.0], 2)
    expected = 1 - (1 * 1 + 2 * 5 + 3 * 2) / math.sqrt((1 + 4 + 9) * (1 + 25 + 4))
    close(m.scale_sensitivity(steps, 0.6, compare="resample", level=1, **haar), expected)
    for tiny in (1e-200, 1e-300):
        far = np.array(signal[:2]) * tiny
        close(m.scale_sensitivity([*far, 1.0, 1.0], 0.5, **haar), m.scale_sensitivity([0.5, 0, 1e9, 1e9], 0.5, **haar))
    assert np.isnan(m.scale_sensitivity(delta(60), 0.5)), "no attention to the first half"


def test_local_share():
    rows = np.array([[0.5, 0.25, 0.25, 0.0], [0.2, 0.2, 0.2, 0.2], [0.0, 0.0, 0.0, 0.0]])
    close(m.local_share(rows, [0, 2, 1], window=1), [0.5, 0.25, np.nan])
    close(m.local_share(rows, [0, 2, 1], window=2), [0.75, 0.75, np.nan])
    close(m.local_share(rows, [3, 6, 1], window=3), [0.5, 0.0, np.nan])


def test_window_entropy():
    close(m.window_entropy(np.full((2, 3, 50), 0.1), 16), np.ones((2, 3)))
    assert (m.window_entropy(np.eye(8), 4) == 0.0).all()
    rows = [0.4, 0.4, 0.2, 0.0]
    close(m.window_entropy(rows, 2), 0.8)
    close(m.window_entropy(rows, 2, weighting="equal"), 0.5)
    close(m.window_entropy(rows, 4), -(0.8 * math.log(0.4) + 0.2 * math.log(0.2)) / math.log(4))
    # Two of three keys are visible; the other window has one, and does not count.
    visible = [True, False, True, False, True, False]
    close(m.window_entropy([0.3, 0.0, 0.3, 0.0, 0.4, 0.0], 3, visible=visible), 1.0)
    assert np.isnan(m.window_entropy([0.0, 0.0, 1.0], 2)), "the last window has one key"


def test_uncertainty_is_an_equality_for_combs():
    length = 12
    for spacing in (1, 2, 3, 4, 6, 12):
        comb = np.where(np.arange(length) % spacing == 0, 2.0, 0.0)
        found = m.entropic_uncertainty([comb, np.roll(comb, 1)])
        teeth = length // spacing
        close(found.position, np.log([teeth, teeth]))
        close(found.frequency, np.log([spacing, spacing]))
        close(found.slack, [0.0, 0.0])
        assert found.bound == pytest.approx(math.log(12), abs=8 * EPS)
    assert m.entropic_uncertainty(np.arange(length) % 5 == 0).slack > 0.1


def test_uncertainty_of_anything():
    rows = np.random.default_rng(0).dirichlet(np.full(20, 0.3), size=50)
    found = m.entropic_uncertainty(rows)
    assert found.slack.min() > 0.0
    unitary = np.exp(-2j * np.pi * np.outer(np.arange(20), np.arange(20)) / 20) / math.sqrt(20)
    frequencies = abs(np.sqrt(rows) @ unitary) ** 2
    close(found.frequency, -(frequencies * np.log(frequencies)).sum(-1))
    close(found.slack, found.position + found.frequency - math.log(20))
    assert np.isnan(m.entropic_uncertainty(np.zeros(3)).slack)


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda: plain(3.0), r"signals must be an array \(..., N\)"),
        (lambda: plain(np.ones((2, 0))), r"got the shape \(2, 0\)"),
        (
            lambda: m.power_spectral_density(delta(), window="hamming"),
            "window must be one of 'hann', None; got 'hamming'",
        ),
        (lambda: plain(delta(), nfft=63), "nfft must be at least the length of the signals, 64, got 63"),
        (lambda: m.band_shares(plain(delta()), edges=(0.5, 0.5)), r"edges must ascend .* got \(0.5, 0.5\)"),
        (lambda: m.band_shares(plain(delta()), edges=(1.0,)), r"edges must ascend .* got \(1.0,\)"),
        (lambda: m.positional_entropy([-0.5]), "rows must not be negative, got -0.5"),
        (lambda: m.entropy([0.5], base=1.0), r"base must be above 1, got 1.0"),
        (lambda: m.entropy_correlation([1.0], [1.0, 2.0]), r"of one shape \(S,\), got \(1,\) and \(2,\)"),
        (lambda: m.wavelet_coefficients(delta(), level=5), r"level must be in 0 .. 4 for 64 samples and 'db2', got 5"),
        (lambda: m.wavelet_coefficients(delta(), wavelet="db0"), "db0"),
        (lambda: m.wavelet_coefficients(delta(), mode="wrap"), "wrap"),
        (lambda: m.scale_sensitivity(delta(), 0.0), r"alpha must be above 0, at most 1, .* got 0.0"),
        (lambda: m.scale_sensitivity(delta(), 1.5), r"got 1.5"),
        (lambda: m.scale_sensitivity([1.0], 0.5), "leave one of 1 samples; got 0.5"),
        (lambda: m.scale_sensitivity(delta(), 0.5, sampling="random"), "sampling must be one of 'prefix', 'stride'"),
        (lambda: m.scale_sensitivity(delta(), 0.5, compare="pad"), "compare must be one of 'energy', 'truncate'"),
        (lambda: m.local_share(np.eye(3), [0, 1]), r"must be \(R, N\) and \(R,\), got \(3, 3\) and \(2,\)"),
        (lambda: m.local_share(np.eye(3), [0, 1, 2], window=0), "window must be at least 1, got 0"),
        (lambda: m.window_entropy(np.eye(3), 1), "window must be at least 2, got 1"),
        (lambda: m.window_entropy(np.eye(3), 2, visible=[True]), r"visible must have the shape of rows, \(3, 3\)"),
        (lambda: m.window_entropy(np.eye(3), 2, weighting="mean"), "weighting must be one of 'mass', 'equal'"),
    ],
)
def test_refusals(compute, message):
    with pytest.raises(ValueError, match=message):
        compute()


def test_transform_takes_the_arguments_of_wavelets_only():
    with pytest.raises(TypeError, match="nfft"):
        m.scale_sensitivity(delta(), 0.5, nfft=3)
