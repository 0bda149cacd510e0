"""Multi-resolution (MRA) attention for PyTorch on the CPU: exact where it matters, pooled everywhere else."""

from . import nn
from ._core import __version__
from ._ops import flops as _flops  # noqa: F401  # pyright: ignore[reportUnusedImport]  importing it registers the counts
from ._plan import Plan
from .cache import KVCache
from .config import MRAConfig
from .functional import can_run, plan, scaled_dot_product_attention
from .integrations.report import FallbackWarning
from .integrations.sdpa import replace_sdpa
from .layer_configs import LayerConfigs
from .varlen import varlen_attention

__all__ = [
    "FallbackWarning",
    "KVCache",
    "LayerConfigs",
    "MRAConfig",
    "Plan",
    "__version__",
    "can_run",
    "nn",
    "plan",
    "replace_sdpa",
    "scaled_dot_product_attention",
    "varlen_attention",
]
