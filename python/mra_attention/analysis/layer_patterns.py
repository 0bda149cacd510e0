"""Which layers are wanted: names, or regular expressions of them."""

from __future__ import annotations

import re
from typing import Any


class LayerPatterns:
    """Regular expressions that whole names match, and what they were asked about.

    Parameters
    ----------
    given : str, re.Pattern, iterable of these, or None
        None wants every layer.

    Raises
    ------
    TypeError, ValueError
        If one is no regular expression.
    """

    def __init__(self, given: Any) -> None:
        self._patterns = None if given is None else [_compiled(each) for each in _listed(given)]
        self._matched: set[re.Pattern[str]] = set()
        self._seen: dict[str, None] = {}

    def want(self, layer: str) -> bool:
        """Return whether a layer is wanted."""
        self._seen[layer] = None
        if self._patterns is None:
            return True
        matching = [pattern for pattern in self._patterns if pattern.fullmatch(layer)]
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
                raise ValueError(
                    f"layers has {pattern.pattern!r}, which matches none of {', '.join(map(repr, self._seen))}"
                )


def _listed(given: Any) -> list[Any]:
    if isinstance(given, (str, re.Pattern)):
        return [given]
    try:
        return list(given)
    except TypeError:
        raise TypeError(f"layers must be None, a regular expression or several, got {given!r}") from None


def _compiled(given: Any) -> re.Pattern[str]:
    if not isinstance(getattr(given, "pattern", given), str):
        raise TypeError(f"layers must be names or regular expressions of names, got {given!r}")
    try:
        return re.compile(given)
    except re.error as error:
        raise ValueError(f"layers has {given!r}, which is no regular expression: {error}") from error
