"""The gradient of an additive `attn_mask`: docs/definitions.md, sections 3, 4 and 6."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import helpers
import mra_attention
import oracle
import plain_float32
import pytest
import torch
from forms import distance, documents, hide, holes, left_padding, normal, right_padding, sinks, slopes
from helpers import assert_close, named, random_inputs
from mra_attention import scaled_dot_product_attention
from oracle import Settings
from torch import Tensor, nn
from torch.autograd.gradcheck import gradcheck
from torch.nn.functional import scaled_dot_product_attention as torch_attention

SHAPE = (2, 4, 43, 43, 6)
SIZES = SHAPE[:4]


def bias_gradient(
    inputs: tuple[Tensor, ...],
    settings: Settings,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    **more: Any,
) -> Tensor:
    """By the package, in the shape of the bias."""
    leaf = settings.bias.detach().clone().requires_grad_()
    keywords = helpers.call_keywords(inputs[0], inputs[1], settings) | {"attn_mask": leaf} | more
    out, lse = scaled_dot_product_attention(*inputs, return_lse=True, **keywords)
    outputs, cotangents = ([out], [grad_out]) if grad_lse is None else ([out, lse], [grad_out, grad_lse])
    (gradient,) = torch.autograd.grad(outputs, leaf, cotangents)
    assert (gradient.dtype, gradient.shape) == (leaf.dtype, leaf.shape)
    return gradient


def beside(sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    """What else logits are made of."""
    return {"softcap": 0.7, "alibi_slopes": slopes(sizes), "sinks": sinks(sizes)}


CASES: dict[str, dict[str, Any]] = {
    "of each pair": {"bias": 2 * normal(SIZES)},
    "of each pair, sparse": {"bias": 2 * normal(SIZES), "mode": "sparse"},
    "zeros": {"bias": torch.zeros(SIZES, dtype=torch.float64)},
    "of heads": {"bias": normal(SIZES)[0]},
    "of heads, with a batch dimension": {"bias": normal(SIZES)[:1]},
    "of batch items": {"bias": normal(SIZES)[:, :1]},
    "of pairs": {"bias": normal(SIZES)[0, 0]},
    "of keys": {"bias": normal(SIZES)[0, 0, 0]},
    "of keys of batch items": {"bias": normal(SIZES)[:, :1, :1]},
    "of queries": {"bias": normal(SIZES)[:1, :, :, :1]},
    "of heads alone": {"bias": normal(SIZES)[:1, :, :1, :1]},
    "one number": {"bias": normal(SIZES)[:1, :1, :1, :1]},
    "token form": {"bias": 2 * normal(SIZES), "pool_queries": False},
    "beside softcap, slopes and sinks": {"bias": normal(SIZES)[0], **beside(SIZES)},
    "causal, beside softcap, slopes and sinks": {"bias": normal(SIZES)[0], "is_causal": True, **beside(SIZES)},
    "causal": {"bias": normal(SIZES)[0], "is_causal": True},
    "causal, sparse": {"bias": normal(SIZES)[0], "is_causal": True, "mode": "sparse"},
    "causal, zeros": {"bias": torch.zeros(SIZES, dtype=torch.float64), "is_causal": True},
    "causal, of keys": {"bias": normal(SIZES)[0, 0, 0], "is_causal": True},
    "window": {"bias": normal(SIZES)[0], "window": (9, 4)},
    "documents": {"bias": normal(SIZES).masked_fill(~documents(SIZES), -math.inf)},
    "zeros and documents": {"bias": hide(documents(SIZES))[None, None]},
    "huge numbers": {"bias": hide(distance(SIZES) >= 0, -1e9)},
    "padded keys": {"bias": (normal(SIZES) + hide(right_padding(2, 43))[:, None, None])},
    "padded keys on the left": {"bias": (normal(SIZES) + hide(left_padding(2, 43))[:, None, None])},
    "padded keys and nothing else": {"bias": hide(holes(2, 43))[:, None, None]},
    "padded queries": {"bias": normal(SIZES)[0], "query_mask": holes(2, 43, 2)},
    "padded, causal": {
        "bias": normal(SIZES) + hide(left_padding(2, 43))[:, None, None],
        "query_mask": left_padding(2, 43),
        "is_causal": True,
    },
    "queries without a key": {"bias": normal(SIZES).masked_fill(torch.arange(43)[:, None] % 5 == 0, -math.inf)},
}


@pytest.mark.parametrize("case", CASES)
def test_the_definition(case: str) -> None:
    query, key, value, grad_out, grad_lse = random_inputs(SHAPE, key_heads=2, value_dim=5)
    settings = Settings(**({"block_size": 8, "blocks_per_row": 2.0} | CASES[case]))
    selected = helpers.block_mask(query, key, settings)
    for cotangents in ((grad_out, None), (grad_out, grad_lse), (torch.zeros_like(grad_out), grad_lse)):
        actual = bias_gradient((query, key, value), settings, *cotangents)
        expected = oracle.bias_gradient(query, key, value, selected, settings, *cotangents)
        assert_close(actual, expected, "dB")
        assert (actual[settings.bias == -math.inf] == 0).all()


def test_dropout() -> None:
    query, key, value, grad_out, grad_lse = random_inputs(SHAPE, key_heads=2)
    for more in ({}, {"is_causal": True}):
        settings = Settings(block_size=8, blocks_per_row=2.0, bias=normal(SIZES)[0], **more)
        selected = helpers.block_mask(query, key, settings)
        keep = helpers.keep_factors(query, key, selected, 0.3, 5)
        torch.manual_seed(5)
        actual = bias_gradient((query, key, value), settings, grad_out, grad_lse, dropout_p=0.3)
        with named(more):
            expected = oracle.bias_gradient(query, key, value, selected, settings, grad_out, grad_lse, keep)
            assert_close(actual, expected, "dB")


@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("more", [{}, {"is_causal": True}, {"pool_queries": False}], ids=str)
def test_gradcheck_on_a_frozen_plan(mode: str, more: dict[str, Any]) -> None:
    inputs = [x.requires_grad_() for x in random_inputs((2, 2, 19, 27, 3), key_heads=1)[:3]]
    for shape in ((2, 2, 19, 27), (2, 19, 27), (2, 1, 1, 27), (19, 1)):
        bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        given = {"enable_gqa": True, "is_causal": more.get("is_causal", False)}
        settings = {"resolutions": (8, 1), "blocks_per_row": 1.0, "pool_queries": more.get("pool_queries", True)}
        plan = mra_attention.plan(*inputs[:2], bias, **given, **settings)

        def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, **fixed: Any) -> Any:
            return scaled_dot_product_attention(query, key, value, bias, return_lse=True, **fixed)

        fixed = given | {"plan": plan, "mode": mode}
        assert gradcheck(lambda *tensors, fixed=fixed: attention(*tensors, **fixed), (*inputs, bias), fast_mode=True)


FULL = {"blocks_per_row": math.inf, "resolutions": (8, 1)}
BIASES = {
    "(B, H, Lq, Lk)": lambda bias: bias,
    "(B, 1, Lq, Lk)": lambda bias: bias[:, :1],
    "(H, Lq, Lk)": lambda bias: bias[0],
    "(Lq, Lk)": lambda bias: bias[0, 0],
    "(B, 1, 1, Lk)": lambda bias: bias[:, :1, :1],
    "(1, H, Lq, 1)": lambda bias: bias[:1, :, :, :1],
    "(Lk,)": lambda bias: bias[0, 0, 0],
    "causal": lambda bias: bias[0].masked_fill(torch.ones(bias.shape[2:]).tril() == 0, -math.inf),
}


def all_gradients(function: Any, inputs: list[Tensor], grad_out: Tensor, **keywords: Any) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves, **keywords)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BIASES)
def test_everything_selected_is_torchs_attention(dtype: torch.dtype, name: str) -> None:
    sizes = (2, 2, 70, 90)
    query, key, value, grad_out, _ = random_inputs((*sizes, 16), dtype=dtype)
    bias = BIASES[name](normal(sizes)).to(dtype)
    inputs = [query, key, value, bias]
    exact = all_gradients(torch_attention, [x.double() for x in inputs], grad_out.double())

    def rows(gradient: Tensor) -> list[Tensor]:
        return [gradient.reshape(-1, 1)]

    def floor() -> list[Tensor]:
        return rows(plain_float32.attention(*inputs[:3], grad_out, attn_mask=bias, with_bias=True)[4])

    comparison = rows(all_gradients(torch_attention, inputs, grad_out)[4])
    for more in ({}, {"mode": "sparse", "pool_queries": False}):
        actual = all_gradients(scaled_dot_product_attention, inputs, grad_out, **FULL, **more)
        assert actual[4].dtype == dtype
        with named(more):
            if dtype == torch.float64:
                for part, a, e in zip(("out", "dq", "dk", "dv", "dB"), actual, exact, strict=True):
                    assert_close(a, e, part)
            else:
                budget = helpers.Budget([comparison], floor)
                helpers.assert_results_within_budget(rows(actual[4]), rows(exact[4]), budget, names=["dB"])
    if dtype in (torch.bfloat16, torch.float16):  # a bias of float32 beside them
        wide = all_gradients(scaled_dot_product_attention, [*inputs[:3], bias.float()], grad_out, **FULL)
        assert wide[4].dtype == torch.float32
        own = all_gradients(scaled_dot_product_attention, inputs, grad_out, **FULL)[4].float()
        precision = torch.finfo(dtype)
        assert ((own - wide[4]).abs() <= precision.eps * wide[4].abs() + precision.smallest_normal).all()


def test_what_is_stored_in_padding_reaches_no_gradient() -> None:
    query, key, value, grad_out, _ = random_inputs(SHAPE)
    mask = right_padding(2, 43)
    bias = normal(SIZES) + hide(mask)[:, None, None]
    for more in ({}, {"is_causal": True}):
        settings = Settings(block_size=8, blocks_per_row=2.0, bias=bias, query_mask=mask, **more)
        clean = bias_gradient((query, key, value), settings, grad_out)
        assert (clean.masked_fill(mask[:, None, :, None] & mask[:, None, None, :], 0.0) == 0).all()
        spoilt = [x.masked_fill(~mask[:, None, :, None], math.nan) for x in (query, key, value, grad_out)]
        # A padded query may have any bias, NaN too; that of a padded key hides it.
        odd = bias.masked_fill(~mask[:, None, :, None], math.nan).masked_fill(~mask[:, None, None, :], -math.inf)
        with named(more):
            actual = bias_gradient(tuple(spoilt[:3]), replace(settings, bias=odd), spoilt[3])
            assert torch.equal(actual, clean)


@pytest.mark.threads(3)
@pytest.mark.parametrize("more", [{}, {"is_causal": True}], ids=str)
def test_any_number_of_threads_gives_the_same_bits(more: dict[str, Any]) -> None:
    sizes = (2, 3, 300, 290)
    query, key, value, grad_out, _ = random_inputs((*sizes, 8), dtype=torch.float32)
    for bias in (normal(sizes), normal(sizes)[0], normal(sizes)[0, 0, 0], normal(sizes)[:1, :1, :, :1]):
        settings = Settings(block_size=8, blocks_per_row=2.0, bias=bias.float(), **more)
        threaded = bias_gradient((query, key, value), settings, grad_out)
        torch.set_num_threads(1)
        with named(tuple(bias.shape)):
            assert torch.equal(bias_gradient((query, key, value), settings, grad_out), threaded)
        torch.set_num_threads(3)


class RelativeBias(nn.Module):
    """As in T5: a number for each head and each distance, up to a limit."""

    def __init__(self, heads: int, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.table = nn.Embedding(2 * limit + 1, heads)
        nn.init.zeros_(self.table.weight)

    def forward(self, length: int) -> Tensor:
        places = torch.arange(length)
        apart = (places - places[:, None]).clamp(-self.limit, self.limit)
        return self.table(apart + self.limit).permute(2, 0, 1)[None]


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_relative_bias_learns(is_causal: bool) -> None:
    """The gradient of a table from zeros is that through torch's attention, and a step along it lowers the loss."""
    query, key, value, target, _ = random_inputs((2, 4, 50, 50, 8), dtype=torch.float32)
    relative = RelativeBias(4, 12)

    def loss(function: Any, **more: Any) -> Tensor:
        return (function(query, key, value, relative(50), **more) - target).square().mean()

    hidden = torch.zeros(50, 50).masked_fill(torch.ones(50, 50).tril() == 0, -math.inf) if is_causal else 0.0
    (expected,) = torch.autograd.grad(
        loss(lambda q, k, v, bias: torch_attention(q, k, v, bias + hidden)), relative.table.weight
    )
    (exact,) = torch.autograd.grad(
        loss(scaled_dot_product_attention, is_causal=is_causal, **FULL), relative.table.weight
    )
    torch.testing.assert_close(exact, expected)
    own = {"is_causal": is_causal, "blocks_per_row": 2, "resolutions": (8, 1)}
    plan = mra_attention.plan(query, key, relative(50), **own)
    given = {"is_causal": is_causal, "plan": plan}
    before = loss(scaled_dot_product_attention, **given)
    before.backward()
    with torch.no_grad():
        relative.table.weight -= 1.0 * relative.table.weight.grad
        assert loss(scaled_dot_product_attention, **given) < before
