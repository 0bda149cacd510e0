"""Cross-attention in decoders: a token learns nothing from later ones, through any way into a model."""

from __future__ import annotations

import contextlib

import mra_attention
import pytest
import torch
import torch.nn.functional as F
from mra_attention import MRAConfig, replace_sdpa
from mra_attention.nn import convert

FEW = MRAConfig(resolutions=(8, 1), blocks_per_row=1)


@pytest.mark.parametrize("way", ["converted", "replaced"])
@pytest.mark.parametrize("length", [60, 75], ids=["equal lengths", "other lengths"])
def test_transformers_of_torch(way: str, length: int) -> None:
    model = torch.nn.Transformer(16, 2, 1, 1, 32, batch_first=True, dropout=0.0).double().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    source, target = torch.randn(2, length, 16).double(), torch.randn(2, 60, 16).double()
    changed = target.clone()
    changed[:, 30:] += 1.0
    mask = torch.nn.Transformer.generate_square_subsequent_mask(60).double()
    if way == "converted":
        convert(model, FEW)
    with torch.no_grad(), replace_sdpa(FEW, min_length=0) if way == "replaced" else contextlib.nullcontext():
        before, after = (model(source, x, tgt_mask=mask, tgt_is_causal=True) for x in (target, changed))
    assert (after - before)[:, :30].abs().max() <= 1e-10
    assert (after - before)[:, 30:].abs().max() > 1e-3


def test_calls_of_unequal_lengths_do_not_average_queries() -> None:
    query, key, value = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 75, 8), torch.randn(1, 2, 75, 8)
    expected = mra_attention.scaled_dot_product_attention(query, key, value, config=FEW, pool_queries=False)
    with replace_sdpa(FEW, min_length=0):
        assert torch.equal(F.scaled_dot_product_attention(query, key, value), expected)


def test_a_step_of_decoding_has_the_newest_keys_exact() -> None:
    """A single query is that of the last key, as a model with a cache means it."""
    query, key, value = (torch.randn(1, 2, 75, 8) for _ in range(3))
    whole = mra_attention.scaled_dot_product_attention(query, key, value, is_causal=True, config=FEW)
    with replace_sdpa(FEW, min_length=0):
        step = F.scaled_dot_product_attention(query[:, :, -1:], key, value)
    assert torch.equal(step, whole[:, :, -1:])
