"""What torch's own attention takes and gives, here too: unusual numbers, heads, layouts, default devices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mra_attention import can_run, plan, scaled_dot_product_attention, varlen_attention
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention as torch_attention

FULL: dict[str, Any] = {"resolutions": (8, 1), "blocks_per_row": math.inf}
BLOCKS: dict[str, Any] = {"resolutions": (8, 1), "blocks_per_row": 2}


def inputs(heads: tuple[int, int, int] = (4, 4, 4), dim: int = 8) -> list[Tensor]:
    sizes = ((heads[0], 43, dim), (heads[1], 51, dim), (heads[2], 51, 5))
    return [torch.randn(2, *size, dtype=torch.float64, requires_grad=True) for size in sizes]


def with_gradients(function: Any, tensors: list[Tensor], **arguments: Any) -> list[Tensor]:
    out = function(*tensors, **arguments)
    return [out, *torch.autograd.grad(out.square().sum(), tensors)]


@pytest.mark.parametrize(
    "arguments",
    [
        {"scale": torch.tensor(0.3)},
        {"scale": torch.tensor(2)},
        {"scale": 0.0},
        {"dropout_p": torch.tensor(0.0)},
        {"dropout_p": False},
        {"dropout_p": True},
        {"dropout_p": torch.tensor(1.0)},
    ],
    ids=str,
)
def test_numbers(arguments):
    tensors = inputs()
    ours = with_gradients(scaled_dot_product_attention, tensors, **FULL, **arguments)
    theirs = with_gradients(torch_attention, tensors, **arguments)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected)


def test_an_infinite_scale():
    """A logit of 0 has no product with it: NaN, as in torch's attention, and never an error."""
    query, key, value = (x.detach() for x in inputs())
    out = scaled_dot_product_attention(query, key, value, scale=math.inf, **FULL)
    assert torch.equal(out.isnan(), torch_attention(query, key, value, scale=math.inf).isnan())
    assert scaled_dot_product_attention(query, key, value, scale=math.inf, is_causal=True, **BLOCKS).shape == out.shape


@pytest.mark.parametrize("heads", [(4, 2, 1), (4, 1, 4), (4, 4, 2), (12, 4, 6)], ids=str)
def test_heads_of_key_and_value_may_differ_in_number(heads):
    tensors = inputs(heads)
    ours = with_gradients(scaled_dot_product_attention, tensors, enable_gqa=True, **FULL)
    theirs = with_gradients(torch_attention, tensors, enable_gqa=True)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected)
    assert (can_run(*tensors) is None) == (heads == (4, 1, 4)), "a single head is repeated without enable_gqa, too"


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("budget", [FULL, BLOCKS], ids=["full", "blocks"])
def test_without_channels_the_result_is_the_mean_of_what_is_visible(budget, is_causal):
    tensors = inputs(dim=0)
    out, *grads = with_gradients(scaled_dot_product_attention, tensors, is_causal=is_causal, **budget)
    visible = torch.ones(43, 51, dtype=torch.float64)
    visible = visible.tril() if is_causal else visible
    torch.testing.assert_close(out, (visible / visible.sum(-1, keepdim=True)) @ tensors[2])
    assert [grad.shape for grad in grads] == [x.shape for x in tensors]
    chosen = plan(*tensors[:2], is_causal=is_causal, **budget)
    assert torch.equal(scaled_dot_product_attention(*tensors, is_causal=is_causal, plan=chosen), out)


def test_packed_sequences_without_channels():
    query, key, value = torch.randn(9, 2, 0), torch.randn(9, 2, 0), torch.randn(9, 2, 3)
    out = varlen_attention(query, key, value, [0, 4, 9], [0, 4, 9])
    torch.testing.assert_close(out[4:], value[4:].mean(0).expand(5, 2, 3))


def test_an_input_stored_sequence_first_gives_an_output_of_that_layout():
    query, key, value = (torch.randn(20, 2, 4, 8).permute(1, 2, 0, 3) for _ in range(3))
    out = scaled_dot_product_attention(query, key, value)
    assert out.permute(2, 0, 1, 3).view(20, 2 * 4 * 8).shape == (20, 64)


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout_p": 0.4},
    "causal": {"is_causal": True},
    "causal, dropout": {"is_causal": True, "dropout_p": 0.4},
    "window": {"window_size": (9, 4)},
    "mask": {"attn_mask": torch.ones(43, 51, dtype=torch.bool).tril(3)},
    "key mask": {"attn_mask": torch.arange(51) < 40},
    "query mask": {"query_padding_mask": torch.arange(43) < 40},
    "block mask": {
        "attn_mask": create_block_mask(lambda b, h, i, j: i + 3 >= j, None, None, 43, 51, device="cpu", BLOCK_SIZE=16)
    },
    "rates": {"blocks_per_row": (1, 2, 3, 4)},
    "lse": {"return_lse": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_another_default_device_makes_no_difference(form):
    tensors = inputs()

    def results() -> list[Tensor]:
        torch.manual_seed(3)
        out = scaled_dot_product_attention(*tensors, **(BLOCKS | FORMS[form]))
        outs = out if isinstance(out, tuple) else (out,)
        return [*outs, *torch.autograd.grad(outs[0].sum(), tensors)]

    expected = results()
    with torch.device("meta"):
        actual = results()
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("form", ["plain", "dropout", "causal, dropout", "window", "lse"])
def test_another_default_device_makes_no_difference_to_packed_sequences_and_plans(form):
    query, key, value = (x[0].transpose(0, 1).detach() for x in inputs())

    def results() -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        out = varlen_attention(query, key, value, [0, 20, 43], [0, 31, 51], **(BLOCKS | FORMS[form]))
        return out if isinstance(out, tuple) else (out,)

    expected = results()
    with torch.device("meta"):
        actual = results()
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    tensors = [x.detach() for x in inputs()[:2]]
    chosen = plan(*tensors, **BLOCKS)
    with torch.device("meta"):
        again = plan(*tensors, **BLOCKS)
        assert torch.equal(again.block_mask(), chosen.block_mask())
        assert torch.equal(again.num_blocks, chosen.num_blocks)
        assert torch.equal(again.density, chosen.density)
