"""In which module of a model a call happens, as its qualified name."""

from __future__ import annotations

import inspect
import weakref
from types import CodeType
from typing import Any

from torch.nn import Module

NO_MODULE = "(no module)"
COMPILED = "(compiled)"

_module: Any = Module
_CALL: CodeType = _module._call_impl.__code__


class LayerNames:
    """Finds the innermost module that is being called, and its name in the outermost one.

    The interpreter's frames say it, so that no hook is registered, which would be a change of the model. Only frames of
    `Module.__call__` are read: reading the variables of a frame can prolong their lives, and those of a model's own
    `forward` may be large.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Module, tuple[weakref.ref[Module], str]] = weakref.WeakKeyDictionary()

    def current(self) -> str:
        """Return the name for the caller, such as "encoder.layers.0.self_attn"; a class for the outermost module."""
        innermost: Module | None = None
        outermost: Module | None = None
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_code is _CALL:
                outermost = frame.f_locals["self"]
                innermost = innermost or outermost
            frame = frame.f_back
        if innermost is None or outermost is None:
            return NO_MODULE
        return self._name(innermost, outermost)

    def _name(self, module: Module, root: Any) -> str:
        known = self._known.get(module)
        if known is not None and known[0]() is root:
            return known[1]
        path: str = next((name for name, found in root.named_modules() if found is module), "")
        name = path or type(module).__name__
        self._known[module] = (weakref.ref(root), name)
        return name
