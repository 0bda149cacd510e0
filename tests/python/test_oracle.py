"""Float64 agrees with the dense evaluation to 1e-10; float32, bfloat16 and float16 within the error of plain torch."""

from __future__ import annotations

import math

import mra_attention
import oracle
import pytest
import torch
from helpers import (
    assert_close,
    assert_matches_oracle,
    assert_results_close,
    assert_results_within_budget,
    block_mask,
    dense_budget,
    random_inputs,
    random_mask,
    run_package,
)
from oracle import Settings
from torch import Tensor

MODES = pytest.mark.parametrize("mode", ["full", "sparse"])
BLOCK_SIZES = pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])


@MODES
@BLOCK_SIZES
@pytest.mark.parametrize(
    ("blocks", "rest"), [(0, 1), (1, -1), (1, 0), (1, 1), (2, 7)], ids=["1", "b-1", "b", "b+1", "2b+7"]
)
def test_lengths(mode, block_size, blocks, rest):
    length = blocks * block_size + rest
    inputs = random_inputs((2, 2, length, length, 16))
    settings = Settings(block_size=block_size, mode=mode, blocks_per_row=1.5)
    assert_matches_oracle(*inputs[:3], settings, *inputs[3:])


@MODES
@BLOCK_SIZES
@pytest.mark.parametrize(("query_blocks", "key_blocks"), [(1, 5), (5, 1), (3, 4)], ids=["wide", "tall", "cross"])
def test_query_and_key_lengths_differ(mode, block_size, query_blocks, key_blocks):
    shape = (1, 2, query_blocks * block_size - 3, key_blocks * block_size + 2, 8)
    inputs = random_inputs(shape)
    settings = Settings(block_size=block_size, mode=mode, blocks_per_row=1.5)
    assert_matches_oracle(*inputs[:3], settings, *inputs[3:])


@MODES
@pytest.mark.parametrize("dim", [1, 3, 8, 17, 64, 96])
@pytest.mark.parametrize("value_dim", [1, 8, 13, 33, 64, 130])
def test_head_dimensions(mode, dim, value_dim):
    inputs = random_inputs((1, 2, 61, 75, dim), value_dim=value_dim)
    settings = Settings(block_size=16, mode=mode, blocks_per_row=2.0)
    assert_matches_oracle(*inputs[:3], settings, *inputs[3:])


@MODES
@pytest.mark.parametrize("block_size", [9, 24, 31, 100, 127])
def test_block_sizes_that_are_no_power_of_two(mode, block_size):
    inputs = random_inputs((1, 2, 3 * block_size + 5, 4 * block_size - 1, 17))
    settings = Settings(block_size=block_size, mode=mode, blocks_per_row=1.5)
    assert_matches_oracle(*inputs[:3], settings, *inputs[3:])


@MODES
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "masks"])
def test_grouped_query_heads(mode, key_heads, masked):
    inputs = random_inputs((2, 4, 70, 83, 8), key_heads=key_heads, value_dim=5)
    masks = {"key_mask": random_mask(2, 83, seed=1), "query_mask": random_mask(2, 70, seed=2)} if masked else {}
    settings = Settings(block_size=16, mode=mode, blocks_per_row=2.0, **masks)
    assert_matches_oracle(*inputs[:3], settings, *inputs[3:])


@MODES
@pytest.mark.parametrize("keep", [0.0, 0.03, 0.5, 0.95])
@pytest.mark.parametrize("which", ["key", "query", "both"])
def test_masks(mode, keep, which):
    inputs = random_inputs((3, 2, 70, 90, 8))
    key_mask = torch.rand(3, 90, generator=torch.Generator().manual_seed(1)) < keep
    query_mask = torch.rand(3, 70, generator=torch.Generator().manual_seed(2)) < keep
    settings = Settings(
        block_size=8,
        mode=mode,
        blocks_per_row=1.7,
        key_mask=key_mask if which != "query" else None,
        query_mask=query_mask if which != "key" else None,
    )
    assert_matches_oracle(*inputs[:3], settings, *inputs[3:])


@MODES
@pytest.mark.parametrize("gradient", ["out", "lse", "both"])
def test_gradients_of_each_output(mode, gradient):
    query, key, value, grad_out, grad_lse = random_inputs((2, 2, 70, 90, 8))
    grad_out = torch.zeros_like(grad_out) if gradient == "lse" else grad_out
    settings = Settings(block_size=8, mode=mode, blocks_per_row=1.7)
    assert_matches_oracle(query, key, value, settings, grad_out, None if gradient == "out" else grad_lse)


@pytest.mark.parametrize("scale", [0.0, 0.02, 1.0, -0.5])
@MODES
def test_scale(mode, scale):
    query, key, *rest = random_inputs((1, 2, 70, 90, 8))
    assert_matches_oracle(query, key, rest[0], Settings(block_size=8, mode=mode, scale=scale), *rest[1:])


@MODES
@pytest.mark.parametrize("forced", [(0, 3), (1, 0), (2, 5), (100, 0)], ids=str)
def test_forced_blocks(mode, forced):
    inputs = random_inputs((1, 2, 70, 90, 8))
    settings = Settings(block_size=8, mode=mode, blocks_per_row=3.0, first_blocks=forced[0], diagonal_blocks=forced[1])
    assert_matches_oracle(*inputs[:3], settings, *inputs[3:])


@MODES
def test_ties(mode):
    _, _, value, grad_out, grad_lse = random_inputs((1, 2, 61, 83, 4))
    query, key = torch.full((1, 2, 61, 4), 0.5).double(), torch.full((1, 2, 83, 4), 2.0).double()
    settings = Settings(block_size=8, mode=mode, num_blocks=20)
    assert_matches_oracle(query, key, value, settings, grad_out, grad_lse)


@MODES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_huge_logits(mode, dtype):
    """Logits of 1e4 and of both signs: exp of anything but a difference to the maximum would overflow."""
    query, key, value, grad_out, grad_lse = random_inputs((2, 2, 70, 90, 16), dtype=dtype, magnitude=50.0)
    settings = Settings(block_size=8, mode=mode, blocks_per_row=2.0)
    selected = block_mask(query, key, settings)
    expected = oracle.run(query, key, value, selected, settings, grad_out, grad_lse)
    assert expected.lse.max() > 1e4
    actual = run_package(query, key, value, settings, grad_out, grad_lse)
    if dtype == torch.float64:
        assert_results_close(actual, expected)
    else:
        budget = dense_budget(query, key, value, selected, settings, grad_out, grad_lse)
        assert_results_within_budget(actual, expected, budget)


@MODES
def test_one_block_far_above_the_others(mode):
    """The maximum may lie in a coarse block or in a selected one: mean 300 against 0, selected or not."""
    query, key, value, grad_out, grad_lse = random_inputs((1, 1, 32, 64, 4))
    query[..., 0], key[..., 0] = 20.0, 0.0
    key[:, :, 8:16, 0] = 30.0
    settings = Settings(block_size=8, mode=mode)
    for column in (1, 3):
        selected = torch.zeros(1, 1, 4, 8, dtype=torch.bool)
        selected[..., column] = True
        assert_with_plan(query, key, value, selected, settings, grad_out, grad_lse)


def assert_with_plan(query: Tensor, key: Tensor, value: Tensor, selected: Tensor, settings: Settings, *grads) -> None:
    """A plan fixes the selection: one made for chosen inputs serves these ones, which would select otherwise."""
    nq = selected.shape[-2]
    b = settings.block_size
    planted_query = torch.eye(nq, dtype=query.dtype).repeat_interleave(b, 0)[None, None, : query.shape[2]]
    planted_key = selected[0, 0].T.to(query.dtype).repeat_interleave(b, 0)[None, None, : key.shape[2]]
    plan = mra_attention.plan(planted_query, planted_key, resolutions=(b, 1), num_blocks=int(selected.sum()), scale=1.0)
    assert torch.equal(plan.block_mask(), selected)
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    out, lse = mra_attention.scaled_dot_product_attention(
        *leaves, resolutions=(b, 1), mode=settings.mode, plan=plan, return_lse=True
    )
    gradients = torch.autograd.grad((out, lse), leaves, grads)
    expected = oracle.run(query, key, value, selected, settings, *grads)
    assert_results_close(oracle.Result(out, lse, *gradients), expected)


@MODES
@pytest.mark.parametrize("tiny", [1e-310, 5e-324])
@pytest.mark.parametrize("which", ["query", "key", "value", "grad_out"])
def test_denormals(mode, tiny, which):
    names = ("query", "key", "value", "grad_out")
    *inputs, _ = random_inputs((1, 2, 40, 45, 8))
    inputs = [x.sign() * tiny if name == which else x for name, x in zip(names, inputs, strict=True)]
    settings = Settings(block_size=8, mode=mode, blocks_per_row=2.0)
    selected = block_mask(inputs[0], inputs[1], settings)
    actual = run_package(*inputs[:3], settings, inputs[3])
    assert_results_close(actual, oracle.run(*inputs[:3], selected, settings, inputs[3]))


def test_denormal_values_are_kept():
    value = torch.full((1, 1, 40, 4), 1e-310, dtype=torch.float64)
    query, key, *_ = random_inputs((1, 1, 40, 40, 4))
    out = mra_attention.scaled_dot_product_attention(query, key, value, resolutions=(8, 1), blocks_per_row=2.0)
    assert ((out - 1e-310).abs() <= 1e-313).all()


@MODES
@pytest.mark.parametrize("shape", [(0, 2, 9, 9, 4), (2, 0, 9, 9, 4), (2, 2, 0, 9, 4), (2, 2, 9, 0, 4)], ids=str)
def test_empty_dimensions(mode, shape):
    inputs = random_inputs(shape)
    actual = run_package(*inputs[:3], Settings(block_size=8, mode=mode), *inputs[3:])
    batch, heads, query_length, _, dim = shape
    assert actual.out.shape == (batch, heads, query_length, dim)
    assert torch.equal(actual.out, torch.zeros_like(actual.out))
    assert actual.lse.shape == (batch, heads, query_length)
    assert (actual.lse == -math.inf).all()
    for gradient, x in zip(actual[2:], inputs, strict=False):
        assert torch.equal(gradient, torch.zeros_like(x))


@MODES
def test_values_without_channels_leave_the_lse(mode):
    inputs = random_inputs((1, 2, 23, 23, 4), value_dim=0)
    settings = Settings(block_size=8, mode=mode, blocks_per_row=1.0)
    selected = block_mask(inputs[0], inputs[1], settings)
    actual = run_package(*inputs[:3], settings, *inputs[3:])
    assert_results_close(actual, oracle.run(*inputs[:3], selected, settings, *inputs[3:]))


def packed(x: Tensor) -> Tensor:
    """(B, H, L, D) as one of three slices of a (B, L, 3, H, D) projection."""
    return torch.stack([x.transpose(1, 2)] * 3, 2)[:, :, 1].transpose(1, 2)


LAYOUTS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "packed": packed,
    "last-dimension-strided": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every-other-token": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "offset": lambda x: torch.cat([x[:, :, :1], x], 2)[:, :, 1:],
    "expanded-batch": lambda x: x[:1].expand_as(x),
    "expanded-heads": lambda x: x[:, :1].expand_as(x),
    "expanded-tokens": lambda x: x[:, :, :1].expand_as(x),
    "expanded-elements": lambda x: x[..., :1].expand_as(x),
}


@MODES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["query", "key", "value", "grad_out", "grad_lse", "all"])
def test_layouts(mode, layout, which):
    """Strides never matter, of inputs and of cotangents; a dimension of stride 0 shares its memory."""
    names = ("query", "key", "value", "grad_out", "grad_lse")
    inputs = []
    for name, x in zip(names, random_inputs((2, 2, 45, 45, 8)), strict=True):
        if which in (name, "all"):
            x = LAYOUTS[layout](x.unsqueeze(-1)).squeeze(-1) if name == "grad_lse" else LAYOUTS[layout](x)
        inputs.append(x)
    query, key, value, *grads = inputs
    settings = Settings(block_size=8, mode=mode, blocks_per_row=2.0)
    if layout == "expanded-tokens":
        # Equal tokens make scores that only rounding tells apart: no selection between them is the right one.
        settings = Settings(block_size=8, mode=mode, num_blocks=100)
    selected = block_mask(query.contiguous(), key.contiguous(), settings)
    actual = run_package(query, key, value, settings, *grads)
    expected = oracle.run(query, key, value, selected, settings, *grads)
    assert_results_close(actual, expected)


def test_gradient_of_an_expanded_leaf_sums_over_its_copies():
    query, key, value, grad_out, _ = random_inputs((3, 2, 45, 45, 8))
    settings = Settings(block_size=8, blocks_per_row=2.0)
    key = key[:1]
    selected = block_mask(query, key.expand_as(query), settings)
    expected = oracle.run(query, key.expand_as(query), value, selected, settings, grad_out)
    leaf = key.clone().requires_grad_()
    out = mra_attention.scaled_dot_product_attention(query, leaf.expand_as(query), value, **settings.keywords())
    (gradient,) = torch.autograd.grad(out, leaf, grad_out)
    assert_close(gradient, expected.dk.sum(0, keepdim=True), "dk")


def test_sum_of_the_output():
    """sum() sends an expanded scalar back: its strides are all zero."""
    query, key, value, *_ = random_inputs((2, 2, 45, 45, 8))
    settings = Settings(block_size=8, blocks_per_row=2.0)
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    mra_attention.scaled_dot_product_attention(*leaves, **settings.keywords()).sum().backward()
    selected = block_mask(query, key, settings)
    expected = oracle.run(query, key, value, selected, settings, torch.ones_like(query))
    for leaf, wanted, name in zip(leaves, expected[2:], ("dq", "dk", "dv"), strict=True):
        assert_close(leaf.grad, wanted, name)


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block_size", [8, 32, 128])
@pytest.mark.parametrize("dims", [(64, 64), (17, 33)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "masks"])
def test_lower_precision(mode, dtype, block_size, dims, masked):
    """At most 2x (gradients 3x) the error of the same formulas in plain torch, in every block."""
    query, key, value, grad_out, grad_lse = random_inputs((2, 2, 261, 295, dims[0]), value_dim=dims[1], dtype=dtype)
    masks = {"key_mask": random_mask(2, 295, seed=1), "query_mask": random_mask(2, 261, seed=2)} if masked else {}
    settings = Settings(block_size=block_size, mode=mode, blocks_per_row=1.6, **masks)
    selected = block_mask(query, key, settings)
    assert 0.01 < selected.double().mean() < 0.9
    actual = run_package(query, key, value, settings, grad_out, grad_lse)
    expected = oracle.run(query, key, value, selected, settings, grad_out, grad_lse)
    budget = dense_budget(query, key, value, selected, settings, grad_out, grad_lse)
    assert actual.lse.dtype == torch.float32
    assert_results_within_budget(actual, expected, budget, block_size=block_size)
