"""Causal attention: the formulas at the shapes that break it, its strictness bit by bit, and what its plan says."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    assert_close,
    assert_matches_oracle,
    assert_results_close,
    assert_same_bits,
    call_keywords,
    random_inputs,
    run_package,
)
from mra_attention import Plan, plan, scaled_dot_product_attention
from oracle import Result, Settings
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

INFINITE = [math.nan, math.inf, -math.inf]
by_mode = pytest.mark.parametrize("mode", ["full", "sparse"])

# torch warns that queries before the first key see nothing, which is what some of these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:Lower right causal bias:UserWarning")


# name: (batch, heads, query length, key length, D), and what differs from the defaults
CASES: dict[str, tuple[tuple[int, int, int, int, int], dict[str, Any]]] = {
    "blocks": ((2, 2, 64, 64, 8), {}),
    "ragged": ((1, 2, 75, 75, 5), {"value_dim": 7}),
    "one token": ((1, 1, 1, 1, 3), {}),
    "block - 1": ((1, 2, 7, 7, 4), {}),
    "block + 1": ((1, 2, 9, 9, 4), {}),
    "2 block + 7": ((1, 2, 23, 23, 4), {}),
    "more keys": ((2, 2, 21, 83, 4), {}),
    "more queries": ((1, 2, 83, 21, 4), {}),
    "one query": ((2, 2, 1, 67, 4), {}),
    "grouped": ((2, 4, 50, 61, 9), {"key_heads": 2}),
    "local": ((1, 2, 90, 90, 4), {"blocks_per_row": 4, "local_blocks": 3}),
    "first": ((1, 2, 90, 90, 4), {"blocks_per_row": 4, "first_blocks": 2}),
    "local and first beyond the budget": (
        (1, 2, 90, 90, 4),
        {"blocks_per_row": 1, "local_blocks": 2, "first_blocks": 2},
    ),
    "one block": ((1, 2, 70, 70, 4), {"blocks_per_row": 1}),
    "large logits": ((1, 2, 70, 70, 4), {"magnitude": 60.0}),
    "blocks of 32": ((1, 2, 150, 150, 16), {"block_size": 32, "blocks_per_row": 2}),
    "blocks of 20": ((1, 1, 90, 90, 4), {"block_size": 20, "blocks_per_row": 2}),
    "no keys": ((1, 2, 5, 0, 4), {}),
    "no queries": ((1, 2, 0, 5, 4), {}),
    "no batch": ((0, 2, 5, 5, 4), {}),
}


def problem(name: str, mode: str) -> tuple[list[Tensor], Settings]:
    """query, key, value, grad_out, grad_lse in float64, and the settings."""
    shape, more = CASES[name]
    wanted = {x: more[x] for x in ("key_heads", "value_dim", "magnitude") if x in more}
    rest = {x: more[x] for x in more if x not in wanted}
    common = {"block_size": 8, "blocks_per_row": 3, "mode": mode, "is_causal": True, "first_blocks": 0}
    return list(random_inputs(shape, **wanted)), Settings(**(common | rest))


@by_mode
@pytest.mark.parametrize("aligned", ["upper-left", "lower-right"])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_formulas(name, aligned, mode):
    (query, key, value, grad_out, grad_lse), settings = problem(name, mode)
    settings = replace(settings, lower_right=aligned == "lower-right")
    assert_matches_oracle(query, key, value, settings, grad_out, grad_lse)


def test_a_plan_of_the_same_call_changes_nothing():
    (query, key, value, grad_out, grad_lse), settings = problem("grouped", "full")
    chosen = plan(query, key, **call_keywords(query, key, settings))
    planned = run_package(query, key, value, settings, grad_out, grad_lse, plan=chosen)
    assert_same_bits(planned, run_package(query, key, value, settings, grad_out, grad_lse))


# Strictly causal, bit for bit

SIZES = pytest.mark.parametrize(
    ("dtype", "dim", "length"), [(torch.float32, 64, 300), (torch.float64, 20, 150), (torch.bfloat16, 32, 150)], ids=str
)
SETTINGS = Settings(blocks_per_row=3, is_causal=True)


@SIZES
@by_mode
@pytest.mark.parametrize("last", [0, 31, 32, 77])
def test_later_tokens_have_no_influence(dtype, dim, length, mode, last):
    query, key, value, grad_out, grad_lse = random_inputs((1, 2, length, length, dim), dtype=dtype)
    settings, known = replace(SETTINGS, mode=mode), slice(last + 1)
    grad_out[:, :, last + 1 :] = 0.0
    grad_lse[:, :, last + 1 :] = 0.0
    before = run_package(query, key, value, settings, grad_out, grad_lse)
    changed = [x.clone() for x in (query, key, value)]
    for x in changed:
        x[:, :, last + 1 :] = 3 * torch.randn_like(x[:, :, last + 1 :])
    after = run_package(*changed, settings, grad_out, grad_lse)
    assert_same_bits(Result(*(x[:, :, known] for x in after)), Result(*(x[:, :, known] for x in before)))
    for grad in after[2:]:
        assert (grad[:, :, last + 1 :] == 0).all()


@SIZES
@by_mode
@pytest.mark.parametrize("last", [0, 31, 32, 77])
@pytest.mark.parametrize("bad", INFINITE, ids=str)
def test_later_tokens_may_be_anything(dtype, dim, length, mode, last, bad):
    """Also NaN and infinity behind a token, in its own block and in later ones: output and gradients are the same."""
    query, key, value, grad_out, grad_lse = random_inputs((1, 2, length, length, dim), dtype=dtype)
    settings, known = replace(SETTINGS, mode=mode), slice(last + 1)
    short = (query[:, :, known], key, value)
    cotangents = (grad_out[:, :, known], grad_lse[:, :, known])
    before = run_package(*short, settings, *cotangents)
    changed = [x.clone() for x in (query, key, value)]
    for x in changed:
        x[:, :, last + 1 :] = bad
    after = run_package(changed[0][:, :, known], *changed[1:], settings, *cotangents)
    assert_same_bits(after, before)
    # With the later queries in the same call, the outputs before them and the gradients of these queries are the same.
    together = run_package(*changed, settings, grad_out, grad_lse)
    assert_same_bits(
        Result(*(x[:, :, known] for x in (*together[:3], before.dk, before.dv))),
        Result(*(x[:, :, known] for x in before)),
    )


@SIZES
@by_mode
def test_one_query_at_a_time_gives_the_rows_of_all(dtype, dim, length, mode):
    query, key, value, _, _ = random_inputs((2, 4, length, length, dim), key_heads=2, dtype=dtype)
    settings = replace(SETTINGS, mode=mode, local_blocks=2)
    whole: dict[str, Any] = call_keywords(query, key, settings) | {"return_lse": True}
    keywords = {name: whole[name] for name in whole if name not in ("is_causal", "attn_mask")}
    out, lse = scaled_dot_product_attention(query, key, value, **whole)
    for start, count in [
        (0, 1),
        (1, 1),
        (31, 1),
        (32, 1),
        (40, 25),
        (63, 2),
        (100, 1),
        (length - 1, 1),
        (64, length - 64),
    ]:
        end = start + count
        part = [query[:, :, start:end], key[:, :, :end], value[:, :, :end]]
        bias = causal_lower_right(count, end)
        step_out, step_lse = scaled_dot_product_attention(*part, attn_mask=bias, **keywords)
        assert torch.equal(step_out, out[:, :, start:end]), f"tokens {start} to {end}"
        assert torch.equal(step_lse, lse[:, :, start:end])


# Shapes, layouts, spellings


def test_dropout_of_everything_and_of_nothing():
    query, key, value = torch.randn(3, 1, 2, 50, 8).unbind()
    assert (scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=1.0) == 0).all()
    state = torch.get_rng_state()
    expected = scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.equal(scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=0.0), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_shape_of_inputs():
    settings = Settings(block_size=8, blocks_per_row=2, is_causal=True).keywords()
    query, key, value = torch.randn(3, 2, 3, 4, 30, 6).unbind()
    out, lse = scaled_dot_product_attention(query, key, value, return_lse=True, **settings)
    flat = [x.flatten(0, 1) for x in (query, key, value)]
    assert torch.equal(out, scaled_dot_product_attention(*flat, **settings).view_as(out))
    assert lse.shape == (2, 3, 4, 30)
    assert torch.equal(out[0, 0], scaled_dot_product_attention(query[0, 0], key[0, 0], value[0, 0], **settings))
    one = scaled_dot_product_attention(query[0, 0, 0], key[0, 0, 0], value[0, 0, 0], **settings)
    assert torch.equal(out[0, 0, 0], one)
    repeated = scaled_dot_product_attention(query, key[:, :, :1], value[:, :, :1], **settings)
    expected = scaled_dot_product_attention(
        query, key[:, :, :1].expand_as(key).contiguous(), value[:, :, :1].expand_as(value).contiguous(), **settings
    )
    assert torch.equal(repeated, expected)


@pytest.mark.parametrize("layout", ["heads-inside", "strided", "expanded"])
def test_every_layout(layout):
    from ops_cases import lay_out

    (query, key, value, grad_out, grad_lse), settings = problem("ragged", "full")
    laid_out = [lay_out(x, layout) for x in (query, key, value, grad_out)]
    plain = [x.contiguous() for x in laid_out]
    actual = run_package(*laid_out[:3], settings, laid_out[3], grad_lse)
    expected = run_package(*plain[:3], settings, plain[3], grad_lse)
    assert_results_close(actual, expected, tolerance=1e-14)


@pytest.mark.parametrize("rate", [0.3, 1.0, 1.4, 1.5, 2, 2.49, 1e300, math.inf])
def test_the_budget_is_rounded(rate):
    query, key = torch.randn(2, 1, 1, 80, 4).unbind()
    chosen = plan(query, key, is_causal=True, resolutions=(8, 1), blocks_per_row=rate, first_blocks=0)
    wanted = min(10, max(1, math.floor(min(rate, 1e6) + 0.5)))
    assert chosen.block_mask()[0, 0, -1].sum() == wanted


def test_the_plan_of_a_causal_call():
    query, key = torch.randn(2, 2, 3, 40, 4).unbind()
    chosen = plan(query, key, causal_lower_right(40, 40), resolutions=(8, 1), blocks_per_row=2, first_blocks=0)
    assert isinstance(chosen, Plan)
    mask = chosen.block_mask()
    assert mask.shape == (2, 3, 40, 5)
    own = torch.arange(40) // 8
    assert mask[..., torch.arange(40), own].all()
    assert not mask[..., torch.arange(5) > own[:, None]].any()
    assert mask.sum(-1)[0, 0].tolist() == [1] * 8 + [2] * 32
    first = plan(query, key, is_causal=True, resolutions=(8, 1), blocks_per_row=1).block_mask()
    assert first[..., 0].all()
    assert first.sum(-1)[0, 0].tolist() == [1] * 8 + [2] * 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    query, key, value = torch.randn(3, 1, 2, 50, 16).unbind()
    with torch.autocast("cpu", dtype=dtype):
        out = scaled_dot_product_attention(query, key, value, is_causal=True)
    assert out.dtype == dtype
    assert torch.equal(
        out, scaled_dot_product_attention(query.to(dtype), key.to(dtype), value.to(dtype), is_causal=True)
    )


def test_equal_scores_are_decided_by_position():
    query, key = torch.ones(1, 1, 80, 4), torch.ones(1, 1, 80, 4)
    chosen = plan(query, key, is_causal=True, resolutions=(8, 1), blocks_per_row=3, first_blocks=0)
    assert chosen.block_mask()[0, 0, -1].nonzero().flatten().tolist() == [0, 1, 9]


@pytest.mark.parametrize(("dim", "scale"), [(12, None), (64, None), (128, None), (64, 0.3), (16, 2.0)])
def test_backward_has_the_logits_of_forward(dim, scale):
    """A token that sees one key weighs it 1, in backward too; of huge logits, any difference would show."""
    query, key, value, grad, _ = random_inputs((64, 4, 1, 1, dim), dtype=torch.float32)
    query, key, value = query * 1e3, key * 1e3, value.requires_grad_()
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, blocks_per_row=4)
    assert torch.equal(out, value)
    assert torch.equal(torch.autograd.grad(out, value, grad)[0], grad)


def test_a_query_that_sees_nothing():
    query, key, value, grad_out, grad_lse = random_inputs((1, 2, 40, 30, 8))
    settings = Settings(block_size=8, blocks_per_row=2, lower_right=True)
    result = run_package(query, key, value, settings, grad_out, grad_lse)
    assert (result.out[:, :, :10] == 0).all()
    assert (result.lse[:, :, :10] == -math.inf).all()
    assert (result.dq[:, :, :10] == 0).all()
    assert result.lse[:, :, 10:].isfinite().all()
    assert all(x.isfinite().all() for x in (result.out, result.dq, result.dk, result.dv))


def test_a_large_head_dimension_and_no_channels():
    query, key, value, grad_out, _ = random_inputs((1, 1, 70, 70, 200), value_dim=0)
    settings = Settings(block_size=8, blocks_per_row=2, is_causal=True)
    result = run_package(query, key, value, settings, grad_out)
    assert result.out.shape == (1, 1, 70, 0)
    assert_close(result.dq, torch.zeros_like(query), "dq")


def test_it_is_another_function_than_without_a_causal_mask():
    query, key, value = torch.randn(3, 1, 2, 100, 8).unbind()
    with_mask = scaled_dot_product_attention(query, key, value, is_causal=True)
    assert not torch.allclose(with_mask, scaled_dot_product_attention(query, key, value))
