"""What the paper reports: Ruscio et al., "Beyond Position", ACL 2025, arXiv 2410.18067, version 4."""

from __future__ import annotations

BANDS = {"low_share": "0.60 to 0.80", "mid_share": "0.15 to 0.25", "high_share": "0.05 to 0.15"}

ENCODER = {
    **BANDS,
    "frequency_selectivity": "0.743",
    "spectral_entropy": "2.449",
    "entropy_correlation": "-0.606",
    "scale_sensitivity_0.5": "0.507",
    "scale_sensitivity_0.25": "0.548",
    "reconstruction_error": "7e-05",
}
"""Bands of all models; the rest is of bert-base, table 4."""

DECODERS = {
    **BANDS,
    "frequency_selectivity": "0.174 to 0.804",
    "spectral_entropy": "2.244 to 3.786",
    "entropy_correlation": "-0.737 to -0.421",
    "scale_sensitivity_0.5": "0.030 to 0.082",
    "scale_sensitivity_0.25": "0.074 to 0.121",
    "reconstruction_error": "1e-07",
    "window_entropy_16": "0.751 to 0.913",
    "window_entropy_32": "0.699 to 0.918",
    "window_entropy_64": "0.624 to 0.916",
    "wavelet_entropy_a5": "0.689 to 0.822",
    "wavelet_entropy_d5": "0.278 to 0.543",
    "wavelet_entropy_d4": "0.450 to 0.922",
    "wavelet_entropy_d3": "0.633 to 1.119",
    "wavelet_entropy_d2": "0.320 to 1.012",
    "wavelet_entropy_d1": "0.213 to 1.019",
}
"""Of the seven decoders with rotary positions, tables 1, 2, 3 and 7; its scales are taken to go from coarse to fine."""


def of_group(group: str) -> dict[str, str]:
    """Return the numbers that belong beside a group of heads."""
    return ENCODER if group == "MiniLM" else DECODERS
