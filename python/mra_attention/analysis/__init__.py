"""What the heads of a model do: spectra and wavelets of attention, errors before they are paid, budgets from data."""

from .attention_call import AttentionCall
from .estimate import ErrorEstimate, ErrorRecord, error_estimate, error_estimates
from .exact_rows import exact_rows

__all__ = ["AttentionCall", "ErrorEstimate", "ErrorRecord", "error_estimate", "error_estimates", "exact_rows"]
