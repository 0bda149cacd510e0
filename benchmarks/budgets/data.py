"""What attention was given in two models, for two texts each: one to choose budgets from, the other to test them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mra_attention import MRAConfig
from mra_attention.analysis import AttentionCall
from torch import Tensor

from ..models import minilm, text
from ..quality import gemma_qkv

DOCUMENTS = 4
"""Of each text, for the encoder."""


@dataclass
class Case:
    """A model's calls for two texts, and how its layers may be approximated."""

    name: str
    chosen_on: list[AttentionCall]
    tested_on: list[AttentionCall]
    plain: MRAConfig
    """The default."""
    sizes: list[MRAConfig]
    """With other block sizes: of these the best uniform budget is taken."""
    settings: list[MRAConfig]
    """With all else that a layer may choose."""
    budgets: Sequence[float]
    targets: Sequence[float]
    """Mean errors on the first text."""
    budget: float
    """At which errors are foretold."""

    def freedoms(self) -> dict[str, list[MRAConfig]]:
        """Return from which configs each layer may have one, with budgets for its heads."""
        return {
            "budgets of heads": [self.plain],
            "and block sizes of layers": self.sizes,
            "and what other blocks count": self.settings,
        }


def encoder() -> Case:
    """Return the 6 layers of a sentence encoder: 12 heads of 32 channels, documents of 512 tokens."""
    model, tokenizer = minilm.load()
    model.set_attn_implementation("sdpa")
    source = text.source_tokens(tokenizer, DOCUMENTS * (minilm.LENGTH - 2) + 1)[1:]
    texts = minilm.documents(tokenizer, DOCUMENTS), minilm.framed(tokenizer, source)
    sizes = [MRAConfig(resolutions=(size, 1)) for size in (16, 32, 64)]
    return Case(
        "MiniLM, 6 layers of 12 heads, 512 tokens",
        *(_calls(model, tokens) for tokens in texts),
        plain=MRAConfig(),
        sizes=sizes,
        settings=[*sizes, *(MRAConfig(resolutions=c.resolutions, coarse="first_order") for c in sizes)],
        budgets=(1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28),
        targets=(0.3, 0.2, 0.1),
        budget=4,
    )


@torch.inference_mode()
def _calls(model: Any, tokens: Tensor) -> list[AttentionCall]:
    found: list[AttentionCall] = []
    attention: Callable[..., Tensor] = F.scaled_dot_product_attention

    def recorded(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append(AttentionCall(query.clone(), key.clone(), value.clone(), layer=f"layer {len(found)}"))
        return attention(query, key, value, *args, **kwargs)

    F.scaled_dot_product_attention = recorded
    try:
        model(input_ids=tokens)
    finally:
        F.scaled_dot_product_attention = attention
    return found


def decoder(path: Path, cache: Path) -> Case:
    """Return the 3 global layers of Gemma 3 270M: 4 heads of 256 channels, 8192 tokens; made if the file is missing."""
    if not path.exists():
        gemma_qkv.capture(path, cache)
    texts: list[list[AttentionCall]] = []
    for name in gemma_qkv.TEXTS:
        layers = [tuple(x[None] for x in gemma_qkv.load(path, name, layer)) for layer in range(gemma_qkv.LAYERS)]
        options: dict[str, Any] = {"is_causal": True, "scale": gemma_qkv.SCALE}
        texts.append([AttentionCall(*qkv, layer=f"layer {i}", **options) for i, qkv in enumerate(layers)])
    sizes = [MRAConfig(resolutions=(size, 1)) for size in (32, 64)]
    return Case(
        "Gemma 3 270M, 3 global layers of 4 heads, 8192 tokens, causal",
        *texts,
        plain=MRAConfig(),
        sizes=sizes,
        settings=[MRAConfig(resolutions=c.resolutions, coarse_shift=shift) for c in sizes for shift in (0.0, 0.5, 1.0)],
        budgets=(2, 3, 4, 6, 8, 12, 16, 24, 32, 48),
        targets=(0.3, 0.2, 0.1),
        budget=8,
    )
