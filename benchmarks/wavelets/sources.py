"""The calls of attention of a pretrained model, and those of an untrained one of the same configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mra_attention.analysis import AttentionCall, capture
from torch import Tensor

from ..models import gemma as gemma_model
from ..models import minilm as minilm_model
from ..models import text

SEED = 0
"""Of the weights of the untrained model."""

PREFIX = 128
"""About the length that the paper's five levels of wavelets suggest; shorter than the window of Gemma's layers."""


@dataclass(frozen=True)
class Group:
    """Heads of one kind, trained and untrained: the same layers over the same sequences."""

    name: str
    budgets: tuple[int, ...]
    """Blocks of 32 tokens in a row at which errors are measured, if any."""
    trained: Sequence[AttentionCall]
    untrained: Sequence[AttentionCall]


def layer_number(layer: str) -> int:
    """Return the depth that the name of a layer has in it."""
    found = re.search(r"\d+", layer)
    if found is None:
        raise ValueError(f"layer must have a number in its name, got {layer!r}")
    return int(found[0])


def untrained(model: Any) -> Any:
    """Return a model of the same configuration with the weights that training starts from."""
    from transformers import AutoModel

    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return AutoModel.from_config(model.config, dtype=torch.float32, attn_implementation="sdpa").eval()


def calls(model: Any, sequences: Tensor) -> Sequence[AttentionCall]:
    """Return the calls of a model for sequences (S, L), one after the other."""
    model.set_attn_implementation("sdpa")
    batches = [{"input_ids": tokens[None]} for tokens in sequences]
    return capture(model, batches, progress=True)


def minilm(documents: int) -> list[Group]:
    """Return the heads of the encoder: 6 layers of 12, for documents of 512 tokens."""
    model, tokenizer = minilm_model.load()
    sequences = minilm_model.documents(tokenizer, documents)
    return [Group("MiniLM", (2, 4), calls(model, sequences), calls(untrained(model), sequences))]


def gemma(cache: Path, count: int, length: int) -> list[Group]:
    """Return the heads of the decoder: 3 global layers of 4, and 15 that see a window of 512 tokens."""
    loaded, tokenizer = gemma_model.load(cache)
    model = loaded.model
    found = text.tokens(tokenizer, 1 + count * (length - 1))
    sequences = torch.cat([found[:1].expand(count, 1), found[1:].view(count, -1)], 1)
    trained, fresh = calls(model, sequences), calls(untrained(model), sequences)
    return split(trained, fresh)


def split(trained: Sequence[AttentionCall], fresh: Sequence[AttentionCall]) -> list[Group]:
    """Return the calls of a decoder as groups: by whether a window hides keys, and the first tokens of all layers."""

    def chosen(of: Sequence[AttentionCall], windowed: bool) -> list[AttentionCall]:
        return [call for call in of if (call.window_size[0] >= 0) == windowed]

    return [
        Group("Gemma, global layers", (8, 16), chosen(trained, False), chosen(fresh, False)),
        Group("Gemma, window layers", (4, 8), chosen(trained, True), chosen(fresh, True)),
        Group(f"Gemma, first {PREFIX} tokens", (), [*map(prefix, trained)], [*map(prefix, fresh)]),
    ]


def prefix(call: AttentionCall) -> AttentionCall:
    """Return the call of a causal layer for the first tokens, which do not see the others."""
    if not call.is_causal or call.attn_mask is not None:
        raise ValueError(f"layer {call.layer!r} must be causal and have no mask beside that")
    tensors = {name: getattr(call, name)[..., :PREFIX, :] for name in ("query", "key", "value")}
    return replace(call, **tensors, query_length=tensors["query"].shape[-2])
