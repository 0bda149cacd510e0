"""What the heads of a model do: spectra and wavelets of attention, errors before they are paid, budgets from data."""

from .attention_call import AttentionCall

__all__ = ["AttentionCall"]
