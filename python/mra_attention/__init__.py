"""Multi-resolution (MRA) attention for PyTorch on the CPU: exact where it matters, pooled everywhere else."""

from ._cache import KVCache
from ._core import __version__
from ._plan import CausalPlan, Plan
from ._varlen import varlen_attention
from .functional import plan, scaled_dot_product_attention

__all__ = ["CausalPlan", "KVCache", "Plan", "__version__", "plan", "scaled_dot_product_attention", "varlen_attention"]
