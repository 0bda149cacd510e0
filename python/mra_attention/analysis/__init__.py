"""What the heads of a model do: spectra and wavelets of attention, errors before they are paid, budgets from data."""

from .attention_call import AttentionCall
from .bound import ErrorBound, error_bound
from .estimate import ErrorEstimate, ErrorRecord, error_estimate, error_estimates
from .exact_rows import exact_rows
from .masses import MassBounds, mass_bounds

__all__ = [
    "AttentionCall",
    "ErrorBound",
    "ErrorEstimate",
    "ErrorRecord",
    "MassBounds",
    "error_bound",
    "error_estimate",
    "error_estimates",
    "exact_rows",
    "mass_bounds",
]
