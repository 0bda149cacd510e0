"""Queries, keys and values of a pretrained sentence encoder: the error against exact attention."""

from __future__ import annotations

import mra_attention
import plain_float32
import pytest
import torch
from data import load_minilm
from helpers import Budget, assert_results_within_budget, summation_orders
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

LAYERS = pytest.mark.parametrize("layer", [1, 4])
BUDGETS = (1.0, 2.0, 4.0, 8.0, 16.0)


def relative_errors(layer: int, mode: str, blocks_per_row: float) -> Tensor:
    """(12,): the Frobenius norm of the error of each head over that of exact attention in float64."""
    query, key, value = load_minilm(layer)
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double())
    out = mra_attention.scaled_dot_product_attention(query, key, value, mode=mode, blocks_per_row=blocks_per_row)
    return ((out.double() - exact).norm(dim=(-1, -2)) / exact.norm(dim=(-1, -2)))[0]


@LAYERS
@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_error_falls_with_the_budget_in_every_head(layer, mode):
    errors = torch.stack([relative_errors(layer, mode, budget) for budget in BUDGETS])
    assert (errors.diff(dim=0) < 0).all()


@LAYERS
def test_coarse_terms_reduce_the_error_on_average(layer):
    for budget in BUDGETS[:-1]:
        full, sparse = (relative_errors(layer, mode, budget).mean() for mode in ("full", "sparse"))
        assert full < sparse


@LAYERS
@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_everything_selected_is_exact_attention(layer, mode, dtype):
    query, key, value = (x.to(dtype) for x in load_minilm(layer))
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double())
    torchs = [[scaled_dot_product_attention(query[..., x], key[..., x], value)] for x in summation_orders(32)]
    budget = Budget(torchs, lambda: plain_float32.attention(query, key, value))
    out = mra_attention.scaled_dot_product_attention(query, key, value, mode=mode, blocks_per_row=16.0)
    assert_results_within_budget([out], [exact], budget, names=["out"])
