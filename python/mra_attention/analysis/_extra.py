"""Modules that the package does not require, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, package: str, what: str) -> Any:
    """Import a module of the `analysis` extra.

    Raises
    ------
    ImportError
        If it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{what} needs {package}: pip install mra-attention[analysis]") from error
