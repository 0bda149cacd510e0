"""The torch operators: one family, `forward`, `backward` and `select`, for dense and for packed tensors."""

from .arguments import Inputs, Settings
from .plain import is_plain
from .register import forward, forward_out, select

__all__ = ["Inputs", "Settings", "forward", "forward_out", "is_plain", "select"]
