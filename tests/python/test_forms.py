"""Every form of attention against the formulas in float64: the same blocks, and results to 1e-10."""

from __future__ import annotations

import itertools
import math
from typing import Any

import oracle
import pytest
import torch
from forms import FORMS, TOKEN_FORMS, by_form, settings_of
from helpers import (
    assert_matches_oracle,
    assert_results_close,
    assert_threads_change_nothing,
    block_mask,
    call_keywords,
    plan_keywords,
    random_inputs,
    run_package,
)
from mra_attention import plan, scaled_dot_product_attention, varlen_attention
from oracle import Result, Settings

# torch warns that queries before the first key see nothing, which is what some of these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:Lower right causal bias:UserWarning")

# (B, H, Lq, Lk, D), and how many heads the keys have
SHAPES: dict[str, tuple[tuple[int, int, int, int, int], int]] = {
    "cross": ((2, 4, 43, 51, 6), 2),
    "self": ((2, 2, 61, 61, 5), 2),
    "tall": ((1, 2, 70, 21, 4), 1),
    "one query": ((2, 2, 1, 67, 4), 2),
    "block - 1": ((1, 2, 7, 7, 3), 2),
    "block": ((1, 2, 8, 8, 3), 2),
    "block + 1": ((1, 2, 9, 9, 3), 2),
    "2 block + 7": ((2, 2, 23, 23, 3), 2),
    "one token": ((1, 1, 1, 1, 2), 1),
}
by_shape = pytest.mark.parametrize("shape", SHAPES)
# What chooses the blocks beside the form.
BUDGETS: dict[str, dict[str, Any]] = {
    "one": {"blocks_per_row": 1.0},
    "half": {"blocks_per_row": 2.5},
    "every": {"blocks_per_row": math.inf},
    "number": {"num_blocks": 11},
    "forced": {"blocks_per_row": 3.0, "first_blocks": 2, "diagonal_blocks": 3},
    "none first": {"blocks_per_row": 2.0, "first_blocks": 0},
    "local": {"blocks_per_row": 3.0, "local_blocks": 2},
    "beyond": {"blocks_per_row": 1.0, "local_blocks": 3, "first_blocks": 2},
    "per head": {"blocks_per_row": [0.4, 2.6, math.inf, 1.0]},
    "largest key": {"blocks_per_row": 2.0, "score": "max", "first_blocks": 0},
    "shift": {"blocks_per_row": 1.0, "coarse_shift": 0.8},
}


def compare(form: str, shape: tuple[int, ...], key_heads: int, **more: Any) -> None:
    inputs = random_inputs(shape, key_heads=key_heads, value_dim=5)
    for mode in ("full", "sparse"):
        assert_matches_oracle(*inputs[:3], settings_of(form, shape, mode=mode, **more), *inputs[3:])


@by_shape
@by_form
def test_shapes(form: str, shape: str) -> None:
    compare(form, *SHAPES[shape])


@pytest.mark.parametrize("budget", BUDGETS)
@by_form
def test_budgets(form: str, budget: str) -> None:
    compare(form, (2, 4, 43, 51, 6), 2, **BUDGETS[budget])


@pytest.mark.parametrize("block_size", [12, 32, 128])
@by_form
def test_block_sizes(form: str, block_size: int) -> None:
    compare(form, (1, 2, 140, 150, 6), 2, block_size=block_size)


@by_form
def test_gradients_of_each_output(form: str) -> None:
    query, key, value, grad_out, grad_lse = random_inputs((2, 2, 43, 51, 6))
    settings = settings_of(form, (2, 2, 43, 51))
    assert_matches_oracle(query, key, value, settings, torch.zeros_like(grad_out), grad_lse)
    assert_matches_oracle(query, key, value, settings, grad_out, None)


@pytest.mark.parametrize("layout", ["heads inside", "strided", "expanded heads", "stride of tokens"])
@by_form
def test_layouts(form: str, layout: str) -> None:
    """Where the tensors lie changes no bit."""
    lay_out = {
        "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "expanded heads": lambda x: x[:, :1].expand_as(x),
        "stride of tokens": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    }[layout]
    shape = (2, 2, 43, 51, 8)
    *inputs, grad_lse = random_inputs(shape, dtype=torch.float32)
    settings = settings_of(form, shape, torch.float32)
    laid_out = [lay_out(x) for x in inputs]
    plain = [x.contiguous() for x in laid_out]
    actual = run_package(*laid_out[:3], settings, laid_out[3], grad_lse)
    expected = run_package(*plain[:3], settings, plain[3], grad_lse)
    for name, a, e in zip(expected._fields, actual, expected, strict=True):
        assert torch.equal(a, e), name


@by_form
def test_any_number_of_threads_gives_the_same_bits(form: str) -> None:
    shape = (2, 3, 300, 310, 16)  # enough work for several threads, and heads that do not divide among them
    inputs = random_inputs(shape, dtype=torch.float32)
    settings = settings_of(form, shape, torch.float32, block_size=16)
    assert_threads_change_nothing(inputs, settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@by_form
def test_a_head_has_the_budget_that_it_has_alone(form: str, dtype: torch.dtype) -> None:
    """To the bit, forward and backward, whatever the budgets of the other heads."""
    shape = (2, 2, 43, 51, 6)
    inputs = random_inputs(shape, dtype=dtype)
    rates = [1.0, 3.4]
    together = run_package(*inputs[:3], settings_of(form, shape, dtype, blocks_per_row=rates), *inputs[3:])
    as_tensor = run_package(
        *inputs[:3],
        settings_of(form, shape, dtype),
        *inputs[3:],
        blocks_per_row=torch.tensor(rates, dtype=torch.float64),
    )
    for head, rate in enumerate(rates):
        alike = run_package(*inputs[:3], settings_of(form, shape, dtype, blocks_per_row=rate), *inputs[3:])
        for result in (together, as_tensor):
            for name, a, e in zip(alike._fields, result, alike, strict=True):
                assert torch.equal(a[:, head], e[:, head]), name


PACKED = ["plain", "no pooled queries", "causal", "causal, lower right", "window", "window, one side", "causal window"]


@pytest.mark.parametrize("form", PACKED)
def test_packed_sequences(form: str) -> None:
    lengths, key_lengths = [7, 0, 33, 8, 1, 64], [7, 5, 20, 41, 0, 64]
    starts = [0, *itertools.accumulate(lengths)], [0, *itertools.accumulate(key_lengths)]
    shape = (1, 4, starts[0][-1], starts[1][-1], 6)
    inputs = random_inputs(shape, key_heads=2, value_dim=5)
    query, key, value, grad_out = (x[0].transpose(0, 1) for x in inputs[:4])
    grad_lse = inputs[4][0]
    for mode in ("full", "sparse"):
        settings = settings_of(form, shape, mode=mode)
        keywords = settings.keywords() | {"return_lse": True, "enable_gqa": True}
        for name in ("attn_mask", "query_padding_mask"):
            del keywords[name]
        if settings.lower_right:
            keywords |= {"is_causal": True, "causal_alignment": "lower_right"}
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        out, lse = varlen_attention(*leaves, *(torch.tensor(x) for x in starts), **keywords)
        grads = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
        expected = oracle.run_packed(query, key, value, starts, settings, grad_out, grad_lse)
        assert_results_close(Result(out.detach(), lse.detach(), *grads), expected)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no budget": ({"blocks_per_row": 0.0}, ValueError, "blocks_per_row"),
    "a budget of NaN": ({"blocks_per_row": math.nan}, ValueError, "blocks_per_row"),
    "budgets of other heads": ({"blocks_per_row": [1.0, 2.0, 3.0]}, ValueError, "blocks_per_row"),
    "a negative budget of a head": ({"blocks_per_row": [1.0, -2.0]}, ValueError, "blocks_per_row"),
    "no block": ({"num_blocks": 0}, ValueError, "num_blocks"),
    "not its own block": ({"local_blocks": 0}, ValueError, "local_blocks"),
    "a mode that is none": ({"mode": "exact"}, ValueError, "mode"),
    "a window of one number": ({"window_size": 5}, TypeError, "window_size"),
    "a window below -1": ({"window_size": (-2, 3)}, ValueError, "window_size"),
    "a number for pool_queries": ({"pool_queries": 2}, TypeError, "pool_queries"),
    "padding of other queries": (
        {"query_padding_mask": torch.ones(2, 44, dtype=torch.bool)},
        ValueError,
        "query_padding",
    ),
}


@pytest.mark.parametrize("refused", REFUSED)
@by_form
def test_what_no_form_takes(form: str, refused: str) -> None:
    """The message names the argument, whatever the form."""
    more, error, message = REFUSED[refused]
    query, key, value, *_ = random_inputs((2, 2, 43, 51, 6))
    keywords = call_keywords(query, key, settings_of(form, (2, 2, 43, 51))) | more
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(query, key, value, **keywords)
    with pytest.raises(error, match=message):
        plan(query, key, **plan_keywords(query, key, settings_of(form, (2, 2, 43, 51))) | more)


def test_items_of_a_batch_may_have_unlike_forms() -> None:
    """A mask that hides a pair in one item leaves the block form to the other."""
    query, key, value, grad_out, grad_lse = random_inputs((2, 2, 43, 51, 6))
    mask = torch.ones(2, 1, 43, 51, dtype=torch.bool)
    mask[1, :, 5, 7] = False
    settings = Settings(block_size=8, blocks_per_row=1.5, bias=mask)
    assert oracle.forms(query, key, settings) == ["block", "token"]
    selected = oracle.select(query, key, settings)
    actual = run_package(query, key, value, settings, grad_out, grad_lse)
    assert_results_close(actual, oracle.run(query, key, value, selected, settings, grad_out, grad_lse))
    assert torch.equal(block_mask(query, key, settings)[1], selected[1])


def test_the_table_has_every_spelling_of_a_hidden_pair() -> None:
    """A form that is added to the table is tested by all of the above."""
    assert len(FORMS) == len(set(FORMS))
    spellings = [settings_of(form, (2, 2, 43, 51)) for form in TOKEN_FORMS]
    assert any(s.is_causal for s in spellings)
    assert any(s.lower_right for s in spellings)
    assert any(s.window[1] > 0 for s in spellings)
    assert {s.bias.dtype for s in spellings if s.bias is not None} == {torch.bool, torch.float64}
