"""What the heads of a model do: spectra and wavelets of attention, errors before they are paid, budgets from data."""

from .attention_call import AttentionCall
from .budget_curves import BudgetCurve
from .calibrating import calibrate
from .calibration import CalibratedLayer, Calibration

__all__ = ["AttentionCall", "BudgetCurve", "CalibratedLayer", "Calibration", "calibrate"]
