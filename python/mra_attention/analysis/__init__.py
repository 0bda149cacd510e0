"""What the heads of a model do: spectra and wavelets of attention, errors before they are paid, budgets from data."""

from .attention_call import AttentionCall
from .captured import Capture
from .capturing import capture

__all__ = ["AttentionCall", "Capture", "capture"]
