"""Who is told of the calls of this package's attention in a thread, which torch function modes do not see."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator
from typing import Any

import torch

from ._checks.arguments import Arguments

Observer = Callable[[tuple[Any, Any, Any], Arguments, "tuple[Any, Any] | None"], None]


class _Thread(threading.local):
    def __init__(self) -> None:
        self.observers: list[Observer] = []


_thread = _Thread()


@contextlib.contextmanager
def observed(observer: Observer) -> Generator[None]:
    """Tell a function of every call in this thread whose arguments are accepted.

    It gets query, key and value and the other arguments, as the caller gave them, and the boundaries of packed
    sequences.
    """
    _thread.observers.append(observer)
    try:
        yield
    finally:
        _thread.observers.remove(observer)


def tell(inputs: tuple[Any, Any, Any], arguments: Arguments, boundaries: tuple[Any, Any] | None = None) -> None:
    """Tell of a call; compiled code does not."""
    if torch.compiler.is_compiling():
        return
    for observer in _thread.observers:
        observer(inputs, arguments, boundaries)


def refuse(function: str) -> None:
    """Refuse a call of a function that cannot tell, if there is somebody to be told."""
    if not torch.compiler.is_compiling() and _thread.observers:
        raise NotImplementedError(
            f"{function} is not captured; capture a forward pass of the whole sequence, which calls "
            "mra_attention.scaled_dot_product_attention"
        )
