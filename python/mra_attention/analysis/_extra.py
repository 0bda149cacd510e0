"""Modules that the package does not require, imported when they are needed."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any, TypeVar

_Item = TypeVar("_Item")


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


def with_progress(items: Iterable[_Item], shown: bool, what: str, unit: str) -> Iterable[_Item]:
    """Return what is to be gone through, with a bar if one is to be shown."""
    return require("tqdm.auto", "tqdm", "progress=True").tqdm(items, desc=what, unit=unit) if shown else items
