"""Modules: torch.nn.MultiheadAttention with the attention of this package, and `convert` for models that have it."""

from .attention import MultiheadAttention
from .conversion import convert

__all__ = ["MultiheadAttention", "convert"]
