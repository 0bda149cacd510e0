"""Which layers are wanted: names, or patterns of them as `LayerConfigs` has."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any


class LayerPatterns:
    """Patterns of names, and what they were asked about.

    Parameters
    ----------
    given : str, iterable of str, or None
        Patterns that whole names match, as `"encoder.layers.1?.self_attn"`; None wants every layer.

    Raises
    ------
    TypeError
        If one is no string.
    """

    def __init__(self, given: Any) -> None:
        self._patterns = None if given is None else _listed(given)
        self._matched: set[str] = set()
        self._seen: dict[str, None] = {}

    def want(self, layer: str) -> bool:
        """Return whether a layer is wanted."""
        self._seen[layer] = None
        if self._patterns is None:
            return True
        matching = [pattern for pattern in self._patterns if fnmatchcase(layer, pattern)]
        self._matched.update(matching)
        return bool(matching)

    def check(self, model: str) -> None:
        """Refuse a run without calls, and patterns that no layer matched."""
        if not self._seen:
            raise ValueError(
                f"{model} made no call of attention that can be captured: of scaled_dot_product_attention of "
                "torch.nn.functional or mra_attention. For a model of transformers call "
                'model.set_attn_implementation("sdpa") first; attention that is written out by hand, or runs in a '
                "scripted module or in another thread, is not seen"
            )
        for pattern in self._patterns or ():
            if pattern not in self._matched:
                raise ValueError(f"layers has {pattern!r}, which matches none of {', '.join(map(repr, self._seen))}")


def _listed(given: Any) -> list[str]:
    if not isinstance(given, (str, Iterable)):
        raise TypeError(f"layers must be None, a name or pattern, or several, got {given!r}")
    patterns: list[Any] = [given] if isinstance(given, str) else [*given]  # pyright: ignore[reportUnknownArgumentType]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"layers must be names or patterns of names, got {pattern!r}")
    return patterns
