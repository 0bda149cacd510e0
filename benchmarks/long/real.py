"""Queries, keys and values of the global layers of Gemma 3 270M over a long text."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import gemma, text

SCALE = 1 / 16
"""Of the logits of its heads of 256 channels."""

Layers = list[tuple[Tensor, Tensor, Tensor]]


def layers(cache: Path, length: int) -> Layers:
    """Return query (1, 4, L, 256), key and value (1, 1, L, 256) of the 3 global layers, from a file if there is one.

    Making it takes minutes: the model runs over the whole text with exact attention.
    """
    path = cache / f"gemma-qkv-{length}.pt"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(_capture(*gemma.load(cache), length), path)
    return torch.load(path)


def _capture(model: Any, tokenizer: Any, length: int) -> Layers:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    tokens = text.tokens(tokenizer, length)
    gemma.use(math.inf, model)  # exact, and in the other layers only the window
    attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS["mra"]
    found: Layers = []

    def recorded(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module.sliding_window is None:
            found.append((query.clone(), key.clone(), value.clone()))
        return attention(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["mra"] = recorded
    try:
        with torch.no_grad():
            model.model(input_ids=tokens[None], use_cache=False)
    finally:
        del ALL_ATTENTION_FUNCTIONS["mra"]  # it lay above the one that is registered
    return found
