"""What compilers leave to Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def untraced(function: _Function) -> _Function:
    """Make `torch.compile` split its graph at a function, which looks at values of tensors."""
    return cast("_Function", torch.compiler.disable(function))  # pyright: ignore[reportUnknownMemberType]
