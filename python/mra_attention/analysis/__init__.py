"""What the heads of a model do: spectra and wavelets of attention, errors before they are paid, budgets from data."""

from ._analyze import analyze
from ._report import report
from .attention_call import AttentionCall
from .attention_map import AttentionMap
from .bound import ErrorBound, error_bound
from .budget_curves import BudgetCurve
from .calibrating import calibrate
from .calibration import CalibratedLayer, Calibration
from .captured import Capture
from .capturing import capture
from .entropies import entropy, entropy_correlation, positional_entropy, spectral_entropy
from .estimate import ErrorEstimate, ErrorRecord, error_estimate, error_estimates
from .exact_rows import exact_rows
from .locality import local_share, window_entropy
from .maps import Rows, attention_map, logits, rows, take_queries
from .masses import MassBounds, mass_bounds
from .nulls import alibi_rows, alibi_slope, random_call, shuffled_rows, uniform_rows
from .sensitivity import scale_sensitivity
from .spectra import Spectrum, band_shares, frequency_selectivity, power_spectral_density
from .table import Record, Table
from .uncertainty import EntropicUncertainty, entropic_uncertainty
from .wavelets import WaveletCoefficients, reconstruction_error, wavelet_coefficients, wavelet_energy, wavelet_entropy

__all__ = [
    "AttentionCall",
    "AttentionMap",
    "BudgetCurve",
    "CalibratedLayer",
    "Calibration",
    "Capture",
    "EntropicUncertainty",
    "ErrorBound",
    "ErrorEstimate",
    "ErrorRecord",
    "MassBounds",
    "Record",
    "Rows",
    "Spectrum",
    "Table",
    "WaveletCoefficients",
    "alibi_rows",
    "alibi_slope",
    "analyze",
    "attention_map",
    "band_shares",
    "calibrate",
    "capture",
    "entropic_uncertainty",
    "entropy",
    "entropy_correlation",
    "error_bound",
    "error_estimate",
    "error_estimates",
    "exact_rows",
    "frequency_selectivity",
    "local_share",
    "logits",
    "mass_bounds",
    "positional_entropy",
    "power_spectral_density",
    "random_call",
    "reconstruction_error",
    "report",
    "rows",
    "scale_sensitivity",
    "shuffled_rows",
    "spectral_entropy",
    "take_queries",
    "uniform_rows",
    "wavelet_coefficients",
    "wavelet_energy",
    "wavelet_entropy",
    "window_entropy",
]
