"""Numbers and sizes at the ends: huge logits, denormals, infinities, NaN, one visible key, dimensions of size 0.

Every form: two levels, with a mask, with a bias, causal.
"""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from helpers import assert_close, assert_results_close, block_mask, random_inputs
from mra_attention import _core, plan, scaled_dot_product_attention
from oracle import Result, Settings
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

BLOCK = 8
LENGTH = 43
FORMS = ["two levels", "mask", "bias", "causal"]
by_form = pytest.mark.parametrize("form", FORMS)
by_mode = pytest.mark.parametrize("mode", ["full", "sparse"])


def window(length: int = LENGTH) -> Tensor:
    position = torch.arange(length)
    return (position[:, None] - position).abs() <= 11


def visible(form: str, length: int = LENGTH) -> Tensor:
    """(Lq, Lk): what each query may see."""
    if form == "two levels":
        return torch.ones(length, length, dtype=torch.bool)
    return torch.ones(length, length, dtype=torch.bool).tril() if form == "causal" else window(length)


def arguments(form: str, length: int = LENGTH) -> dict[str, Any]:
    if form == "causal":
        return {"is_causal": True}
    if form == "two levels":
        return {}
    mask = visible(form, length)
    return {"attn_mask": mask if form == "mask" else torch.zeros(length, length).masked_fill(~mask, -math.inf)}


def run(form: str, inputs: tuple[Tensor, ...], grad_out: Tensor, grad_lse: Tensor, **more: Any) -> Result:
    leaves = [x.detach().requires_grad_() for x in inputs]
    keywords = {"resolutions": (BLOCK, 1)} | arguments(form, inputs[0].shape[2]) | more
    out, lse = scaled_dot_product_attention(*leaves, return_lse=True, **keywords)
    return Result(out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse)))


def formulas(
    form: str, inputs: tuple[Tensor, ...], grad_out: Tensor, grad_lse: Tensor, mode: str, blocks: int
) -> Result:
    """By docs/definitions.md in float64, for the selection that the package makes."""
    how = {"block_size": BLOCK, "mode": mode, "blocks_per_row": blocks, "is_causal": form == "causal"}
    settings = Settings(**how, bias=arguments(form, inputs[0].shape[2]).get("attn_mask"))
    selected = block_mask(*inputs[:2], settings)
    wide = [x.double() for x in inputs]
    return oracle.run(*wide, selected, settings, grad_out.double(), grad_lse.double())


@by_form
@by_mode
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_huge_logits(form: str, mode: str, dtype: torch.dtype) -> None:
    """Weights are 0 or 1. Rounding moves a logit of 1e4 by a part in 2^24 of it, and its weight by as much."""
    query, key, value, grad_out, grad_lse = random_inputs((1, 2, LENGTH, LENGTH, 6), dtype=dtype, magnitude=90.0)
    assert (query.double() @ key.double().transpose(-1, -2) / math.sqrt(6)).abs().max() > 1e4
    actual = run(form, (query, key, value), grad_out, grad_lse, mode=mode, blocks_per_row=2)
    expected = formulas(form, (query, key, value), grad_out, grad_lse, mode, 2)
    if dtype == torch.float64:
        assert_results_close(actual, expected)
        return
    assert all(x.isfinite().all() for x in actual)
    moved = 1e4 * torch.finfo(torch.float32).eps * 8 + (0 if dtype == torch.float32 else torch.finfo(dtype).eps)
    for name in ("out", "lse", "dv"):
        assert_close(getattr(actual, name), getattr(expected, name), name, tolerance=moved)


def may_flush(dtype: torch.dtype) -> bool:
    """Whether exact products may take denormal numbers for 0: the instructions of AVX-512-BF16 and AMX do."""
    return dtype == torch.bfloat16 and _core.isa() in ("avx512bf16", "amx", "portable-bf16", "portable-amx")


@by_form
@by_mode
@pytest.mark.parametrize(
    ("dtype", "tiny"),
    [
        (torch.float64, 1e-310),
        (torch.float32, 1e-40),
        (torch.bfloat16, 1e-39),
        (torch.bfloat16, 1e-36),  # a few denormal values among others
        (torch.float16, 1e-6),
    ],
)
def test_denormal_values(form: str, mode: str, dtype: torch.dtype, tiny: float) -> None:
    """Nothing is flushed to 0: the output is off by a few units of the smallest number, like a sum of so many.

    Where instructions do flush, an average is off by no more than its numbers, and a sum by no more than itself:
    less than the smallest normal number for each of both.
    """
    query, key, value, grad_out, grad_lse = random_inputs((1, 2, LENGTH, LENGTH, 6))
    inputs = (query.to(dtype), key.to(dtype), (tiny * value).to(dtype))
    assert ((inputs[2] != 0) & (inputs[2].abs() < torch.finfo(dtype).tiny)).any()
    actual = run(form, inputs, grad_out.to(dtype), grad_lse.to(actual_lse(dtype)), mode=mode, blocks_per_row=2)
    wide = tuple(x.double() for x in inputs)
    expected = formulas(form, wide, grad_out.to(dtype).double(), grad_lse, mode, 2).out
    normal = torch.finfo(dtype).smallest_normal
    allowed = LENGTH * normal * torch.finfo(dtype).eps + 4 * torch.finfo(dtype).eps * expected.abs().max()
    if may_flush(dtype):
        allowed += 2 * normal
    assert (actual.out.double() - expected).abs().max() <= allowed
    assert (actual.out != 0).double().mean() > 0.5 or (may_flush(dtype) and expected.abs().max() < normal)


def actual_lse(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@by_form
@by_mode
@pytest.mark.parametrize(("dtype", "tiny"), [(torch.float64, 1e-310), (torch.float32, 1e-40), (torch.bfloat16, 1e-40)])
def test_denormal_queries_and_keys_weigh_all_keys_alike(form: str, mode: str, dtype: torch.dtype, tiny: float) -> None:
    query, key, value, grad_out, grad_lse = random_inputs((1, 2, LENGTH, LENGTH, 6))
    inputs = ((tiny * query).to(dtype), (tiny * key).to(dtype), value.to(dtype))
    actual = run(
        form, inputs, grad_out.to(dtype), grad_lse.to(actual_lse(dtype)), mode=mode, blocks_per_row=float(LENGTH)
    )
    weights = visible(form).double()
    expected = (weights / weights.sum(-1, keepdim=True)) @ inputs[2].double()
    assert_close(actual.out, expected, "out", tolerance=4 * torch.finfo(dtype).eps)
    assert all(x.isfinite().all() for x in actual)


def exact(inputs: tuple[Tensor, ...], grad_out: Tensor, form: str) -> Result:
    """Softmax attention as it is written in textbooks."""
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    query, key, value = leaves
    logits = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).masked_fill(~visible(form), -math.inf)
    out = logits.softmax(-1) @ value
    return Result(out.detach(), logits.logsumexp(-1).detach(), *torch.autograd.grad(out, leaves, grad_out.double()))


@by_form
@by_mode
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_reaches_every_query_that_sees_it(
    form: str, mode: str, dtype: torch.dtype, which: str, number: float
) -> None:
    """With every block exact: as in torch's attention for the queries that see it, and as without it for all others.

    There torch's own attention has NaN too, as 0 times NaN, for queries that do not see it.
    """
    *inputs, grad_out, grad_lse = random_inputs((1, 2, LENGTH, LENGTH, 6), dtype=dtype)
    everything = {"mode": mode, "blocks_per_row": float(LENGTH)}
    clean = run(form, tuple(inputs), grad_out, grad_lse, **everything)
    place = 20
    inputs[("query", "key", "value").index(which)][:, :, place, 2] = number
    actual = run(form, tuple(inputs), grad_out, grad_lse, **everything)
    sees = torch.arange(LENGTH) == place if which == "query" else visible(form)[:, place]
    for name in ("out", "lse", "dq"):
        a, c = getattr(actual, name)[:, :, ~sees], getattr(clean, name)[:, :, ~sees]
        assert_close(a, c, name, tolerance=8 * torch.finfo(dtype).eps)
    out, expected = actual.out[:, :, sees], exact(tuple(inputs), grad_out, form).out[:, :, sees]
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    assert which == "key" or not out.isfinite().all()
    if which == "key" and math.isnan(number):
        assert out.isnan().all()
        assert actual.dq[:, :, sees].isnan().all()


@by_form
@by_mode
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_no_query_sees_reaches_nothing(form: str, mode: str, dtype: torch.dtype, number: float) -> None:
    """The last keys are hidden from all queries: whatever they are, the results keep their bits."""
    shown = LENGTH - 13  # a cut block, and a whole one
    *inputs, grad_out, grad_lse = random_inputs((1, 2, LENGTH, LENGTH, 6), dtype=dtype)
    hidden = torch.arange(LENGTH) >= shown
    more: dict[str, Any] = {"mode": mode, "blocks_per_row": 2}
    if form == "causal":
        inputs[0], grad_out, grad_lse = inputs[0][:, :, :shown], grad_out[:, :, :shown], grad_lse[:, :, :shown]
    elif form == "two levels":
        more["attn_mask"] = ~hidden  # key padding
    else:
        mask = window() & ~hidden
        more["attn_mask"] = mask if form == "mask" else torch.zeros(LENGTH, LENGTH).masked_fill(~mask, -math.inf)
    clean = run(form, tuple(inputs), grad_out, grad_lse, **more)
    for index in (1, 2):
        inputs[index][:, :, hidden] = number
    actual = run(form, tuple(inputs), grad_out, grad_lse, **more)
    for name, a, c in zip(Result._fields, actual, clean, strict=True):
        assert torch.equal(a, c), name
    assert (actual.dk[:, :, hidden] == 0).all()
    assert (actual.dv[:, :, hidden] == 0).all()


@by_mode
@pytest.mark.parametrize("form", ["mask", "bias", "key padding", "causal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_visible_key(form: str, mode: str, dtype: torch.dtype) -> None:
    """The output is its value, to the bit; the lse its logit; the query has no influence on the output."""
    *inputs, grad_out, _ = random_inputs((1, 2, LENGTH, LENGTH, 6), dtype=dtype)
    seen = (torch.arange(LENGTH) * 7 + 3) % LENGTH
    queries = slice(0, LENGTH)
    only = torch.arange(LENGTH) == seen[:, None]
    more: dict[str, Any] = {"resolutions": (BLOCK, 1), "mode": mode, "blocks_per_row": 1, "return_lse": True}
    if form == "mask":
        more["attn_mask"] = only
    elif form == "bias":
        more["attn_mask"] = torch.zeros(LENGTH, LENGTH).masked_fill(~only, -math.inf)
    elif form == "key padding":
        seen = torch.full((LENGTH,), 17)
        more["attn_mask"] = torch.arange(LENGTH) == 17
    else:
        seen, queries = torch.zeros(1, dtype=torch.int64), slice(0, 1)
        more["is_causal"] = True
    leaves = [x.requires_grad_() for x in inputs]
    out, lse = scaled_dot_product_attention(*leaves, **more)
    assert torch.equal(out[:, :, queries], inputs[2][:, :, seen])
    logits = (inputs[0][:, :, queries].double() * inputs[1][:, :, seen].double()).sum(-1) / math.sqrt(6)
    precision = torch.finfo(lse.dtype).eps
    assert_close(lse[:, :, queries].detach(), logits.detach(), "lse", tolerance=16 * precision)
    dq, dk, dv = torch.autograd.grad(out[:, :, queries].double().sum(), leaves)
    scale = (grad_out.double().norm(dim=-1).max() * inputs[2].double().norm(dim=-1).max()).item()
    for name, grad in (("dq", dq), ("dk", dk)):
        assert grad.abs().max() <= 64 * precision * max(1.0, scale), name
    counts = torch.zeros(LENGTH, dtype=torch.float64).index_add(0, seen, torch.ones(len(seen), dtype=torch.float64))
    assert_close(dv, counts[:, None].expand(1, 2, LENGTH, 6), "dv", tolerance=8 * torch.finfo(dtype).eps)


SIZES = {
    "no keys": (2, 3, 5, 0, 4),
    "no queries": (2, 3, 0, 5, 4),
    "nothing": (2, 3, 0, 0, 4),
    "no items": (0, 3, 5, 6, 4),
    "no heads": (2, 0, 5, 6, 4),
}
EMPTY_FORMS: dict[str, Any] = {
    "two levels": lambda *_: {},
    "key padding": lambda b, h, q, k: {"attn_mask": torch.ones(b, 1, 1, k, dtype=torch.bool)},
    "query padding": lambda b, h, q, k: {"query_padding_mask": torch.ones(b, q, dtype=torch.bool)},
    "mask": lambda b, h, q, k: {"attn_mask": torch.ones(b, h, q, k, dtype=torch.bool)},
    "mask of pairs": lambda b, h, q, k: {"attn_mask": torch.ones(q, k, dtype=torch.bool).tril()},
    "bias": lambda b, h, q, k: {"attn_mask": torch.randn(b, h, q, k)},
    "bias of heads": lambda b, h, q, k: {"attn_mask": torch.randn(h, 1, 1)},
    "dropout": lambda *_: {"dropout_p": 0.3},
    "causal": lambda *_: {"is_causal": True},
    "causal, lower right": lambda b, h, q, k: {"attn_mask": causal_lower_right(q, k)},
}


@pytest.mark.filterwarnings("ignore:Lower right causal bias:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", EMPTY_FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_dimensions_of_size_zero(size: str, form: str, dtype: torch.dtype) -> None:
    batch, heads, queries, keys, dim = SIZES[size]
    query, key, value, grad_out, grad_lse = random_inputs(SIZES[size], value_dim=3, dtype=dtype)
    more = EMPTY_FORMS[form](batch, heads, queries, keys) | {"resolutions": (BLOCK, 1)}
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out, lse = scaled_dot_product_attention(*leaves, return_lse=True, **more)
    assert (out.shape, out.dtype) == ((batch, heads, queries, 3), dtype)
    assert lse.shape == (batch, heads, queries)
    if size == "no keys":
        assert (lse == -math.inf).all()
        assert (out == 0).all()
    grads = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
    for grad, leaf in zip(grads, leaves, strict=True):
        assert (grad.shape, grad.dtype) == (leaf.shape, dtype)
        assert (grad == 0).all()
    with torch.no_grad():
        assert torch.equal(scaled_dot_product_attention(query, key, value, **more), out)
    if form not in ("dropout", "query padding"):
        del more["resolutions"]
        chosen = plan(query, key, **more)
        assert chosen.num_blocks.sum() == 0
    assert dim == query.shape[3]
