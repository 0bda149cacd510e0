"""The coarse term to first order: docs/definitions.md, section 3.8."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from data import load_minilm
from helpers import assert_close, random_inputs, run_package
from mra_attention import MRAConfig, plan, scaled_dot_product_attention
from oracle import Settings
from torch.autograd.gradcheck import gradcheck
from torch.nn.functional import scaled_dot_product_attention as exact_attention


@pytest.mark.parametrize("layer", [1, 4])
@pytest.mark.parametrize("share", [1 / 8, 1 / 4, 1 / 2])
def test_error_on_real_heads(layer, share):
    """At most 0.75 of that with means at an eighth of the blocks, 0.7 beyond; the mean over heads."""
    inputs = load_minilm(layer)
    exact = exact_attention(*(x.double() for x in inputs))
    errors = {}
    for coarse in ("mean", "first_order"):
        out = scaled_dot_product_attention(*inputs, coarse=coarse, blocks_per_row=16 * share)
        errors[coarse] = ((out.double() - exact).norm(dim=(-1, -2)) / exact.norm(dim=(-1, -2))).mean()
    assert errors["first_order"] <= (0.75 if share < 1 / 4 else 0.7) * errors["mean"]


@pytest.mark.parametrize("shape", [(1, 2, 21, 30, 4), (2, 2, 40, 24, 5)])
def test_gradients_are_those_of_finite_differences(shape):
    query, key, value, *_ = (x.requires_grad_() for x in random_inputs(shape, key_heads=1, value_dim=3))
    made = plan(query, key, resolutions=(8, 1), blocks_per_row=1.5, enable_gqa=True)

    def attend(*inputs):
        return scaled_dot_product_attention(*inputs, plan=made, coarse="first_order", enable_gqa=True, return_lse=True)

    assert gradcheck(attend, (query, key, value))


def test_the_selection_is_that_of_the_means():
    query, key, *_ = random_inputs((2, 2, 90, 70, 6))
    plans = [plan(query, key, resolutions=(8, 1), blocks_per_row=2, coarse=x) for x in ("mean", "first_order")]
    assert torch.equal(plans[0].data, plans[1].data)


def test_equal_queries_have_the_exact_mass_and_value_of_every_block():
    """The expansion is around the mean query, and there it is exact."""
    query, key, value, *_ = random_inputs((1, 2, 64, 64, 6))
    query = query[:, :, :1].expand(-1, -1, 64, -1)
    out, lse = scaled_dot_product_attention(
        query, key, value, resolutions=(16, 1), blocks_per_row=1, coarse="first_order", return_lse=True
    )
    logits = query @ key.transpose(-1, -2) / math.sqrt(6)
    assert_close(out, exact_attention(query, key, value), "out")
    assert_close(lse, logits.logsumexp(-1), "lse")


def test_the_lse_is_never_above_the_exact_one():
    """A tangent lies below a convex function."""
    query, key, value, *_ = random_inputs((2, 3, 150, 130, 8), magnitude=2.0)
    _, lse = scaled_dot_product_attention(query, key, value, blocks_per_row=1, coarse="first_order", return_lse=True)
    exact = (query @ key.transpose(-1, -2) / math.sqrt(8)).logsumexp(-1)
    assert (lse <= exact + 1e-12).all()


@pytest.mark.parametrize("call", [{"is_causal": True}, {"window_size": (9, 9)}, {"pool_queries": False}])
def test_the_token_form_has_the_means(call):
    """To the bit, whatever else the call asks for."""
    query, key, value, *_ = random_inputs((1, 2, 90, 90, 8), dtype=torch.float32)
    call = call | {"blocks_per_row": 1, "softcap": 5.0, "resolutions": (8, 1)}
    results = [scaled_dot_product_attention(query, key, value, coarse=x, **call) for x in ("mean", "first_order")]
    assert torch.equal(*results)


def test_sparse_mode_has_no_coarse_term():
    query, key, value, *_ = random_inputs((1, 2, 90, 90, 8))
    call = {"mode": "sparse", "blocks_per_row": 1, "softcap": 5.0}
    results = [scaled_dot_product_attention(query, key, value, coarse=x, **call) for x in ("mean", "first_order")]
    assert torch.equal(*results)


@pytest.mark.parametrize("length", [1100, 2900])
def test_more_blocks_than_are_summarised_at_once(length):
    """By rows and columns, and by groups of heads."""
    for heads in (1, 4):
        shape = (1, heads, 70, length, 40)
        query, key, value, grad_out, grad_lse = random_inputs(shape, value_dim=24)
        settings = Settings(block_size=8, blocks_per_row=3.0, coarse="first_order")
        selected = oracle.select(query, key, settings)
        actual = run_package(query, key, value, settings, grad_out, grad_lse)
        expected = oracle.run(query, key, value, selected, settings, grad_out, grad_lse)
        for name, a, e in zip(expected._fields, actual, expected, strict=True):
            assert_close(a, e, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_of_a_million(dtype):
    """Weights within a block are 0 and 1 then, and everything stays finite."""
    query, key, value, grad_out, grad_lse = random_inputs((1, 2, 100, 110, 16), dtype=dtype)
    size = 3e4 if dtype == torch.float16 else 1e6
    settings = Settings(block_size=16, blocks_per_row=2.0, coarse="first_order", scale=size)
    result = run_package(query, key, value, settings, grad_out, grad_lse)
    assert all(x.isfinite().all() for x in result[:2])
    selected = oracle.select(query, key, settings)
    exact, _ = oracle.attention(query.double(), key.double(), value.double(), selected, settings)
    agree = ((result.out.double() - exact).abs().amax(-1) < 0.05).double().mean()
    assert agree > 0.9  # where two logits of a million are nearly equal, rounding decides


def test_a_config_may_ask_for_it():
    query, key, value, *_ = random_inputs((1, 2, 90, 90, 8))
    config = MRAConfig(coarse="first_order", blocks_per_row=1)
    by_config = scaled_dot_product_attention(query, key, value, config=config)
    assert torch.equal(
        by_config, scaled_dot_product_attention(query, key, value, coarse="first_order", blocks_per_row=1)
    )
    assert not torch.equal(by_config, scaled_dot_product_attention(query, key, value, blocks_per_row=1))
