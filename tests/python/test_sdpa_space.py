"""A walk through the arguments of torch's attention: dtype, mask, causality, groups, layout, gradients.

At full budget every combination gives torch's result, within the error that torch's own attention of that dtype makes
(docs/definitions.md, section 7), or is refused with an error that says what is wrong. Nothing is ignored.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import plain_float32
import pytest
import torch
from helpers import Budget, assert_close, assert_results_within_budget, summation_orders
from mra_attention import KVCache, MRAConfig, plan, scaled_dot_product_attention
from mra_attention.config import SETTINGS
from torch import Tensor
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as torch_attention

BATCH, HEADS, KEY_HEADS, QUERIES, KEYS, DIM, VALUE_DIM = 2, 4, 2, 41, 67, 12, 10
BLOCK_SIZE = 16
FULL = (BATCH, HEADS, QUERIES, KEYS)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def _bool(*shape: int) -> Tensor:
    """True for two thirds; every query sees the first key."""
    mask = _random(*shape) > -0.4
    mask[..., 0] = True
    return mask


# Each mask is made for the dtype of the inputs, in four dimensions; inputs of fewer dimensions take that many of it.
MASKS: dict[str, Callable[[torch.dtype], Tensor | None]] = {
    "none": lambda _: None,
    "key padding": lambda _: _bool(BATCH, 1, 1, KEYS),
    "bool, two dimensions": lambda _: _bool(QUERIES, KEYS),
    "bool, three dimensions": lambda _: _bool(HEADS, QUERIES, KEYS),
    "bool, each item": lambda _: _bool(BATCH, 1, QUERIES, KEYS),
    "bool, each head": lambda _: _bool(BATCH, HEADS, QUERIES, KEYS),
    "bias": lambda dtype: _random(BATCH, HEADS, QUERIES, KEYS).to(dtype),
    "bias, two dimensions": lambda dtype: _random(QUERIES, KEYS).to(dtype),
    "bias of keys": lambda dtype: _random(BATCH, 1, 1, KEYS).to(dtype),
    "bias of float32": lambda _: _random(BATCH, 1, QUERIES, KEYS).float(),
    "bias of float16": lambda _: _random(BATCH, 1, QUERIES, KEYS).half(),
    "bias with -inf": lambda dtype: _random(QUERIES, KEYS).to(dtype).masked_fill(~_bool(QUERIES, KEYS), -math.inf),
    "causal, upper left": lambda _: causal_upper_left(QUERIES, KEYS),
    "causal, lower right": lambda _: causal_lower_right(QUERIES, KEYS),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded": lambda x: x[:1].expand(x.shape),
    "strided channels": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "three dimensions": lambda x: x[0],
    "two dimensions": lambda x: x[0, 0],
}


class Combination(NamedTuple):
    mask: str
    layout: str
    dtype: torch.dtype
    is_causal: bool
    enable_gqa: bool
    gradients: bool


COMBINATIONS = [
    Combination(*values)
    for values in itertools.product(MASKS, LAYOUTS, DTYPES, (False, True), (False, True), (False, True))
]


def inputs_of(case: Combination) -> tuple[list[Tensor], Tensor]:
    """query, key, value and the gradient of the output."""
    generator = torch.Generator().manual_seed(3)
    key_heads = KEY_HEADS if case.enable_gqa else HEADS
    sizes = [(HEADS, QUERIES, DIM), (key_heads, KEYS, DIM), (key_heads, KEYS, VALUE_DIM), (HEADS, QUERIES, VALUE_DIM)]
    tensors = [torch.randn(BATCH, *size, generator=generator, dtype=torch.float64).to(case.dtype) for size in sizes]
    query, key, value, grad_out = (LAYOUTS[case.layout](x) for x in tensors)
    return [query, key, value], grad_out


def mask_of(case: Combination, dimensions: int) -> Tensor | None:
    mask = MASKS[case.mask](case.dtype)
    while mask is not None and not isinstance(mask, CausalBias) and mask.dim() > dimensions:
        mask = mask[0]
    return mask


def in_torch(inputs: list[Tensor], mask: Tensor | None, is_causal: bool) -> Tensor:
    """Torch's attention, with its heads repeated and its causal masks written out."""
    query, key, value = inputs
    if query.dim() > 2:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    if isinstance(mask, CausalBias):
        lower_right = mask.variant == causal_lower_right(1, 1).variant
        mask = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(KEYS - QUERIES if lower_right else 0)
    if mask is not None and query.dtype == torch.float64 and mask.is_floating_point():
        mask = mask.double()
    if mask is not None and is_causal:
        seen = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril()
        mask = mask & seen if mask.dtype is torch.bool else mask.masked_fill(~seen, -math.inf)
    return torch_attention(query, key, value, attn_mask=mask, is_causal=is_causal and mask is None)


def results(function: Callable[..., Tensor], inputs: list[Tensor], grad_out: Tensor, gradients: bool) -> list[Tensor]:
    if not gradients:
        with torch.no_grad():
            return [function(inputs)]
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def comparisons(case: Combination, inputs: list[Tensor], mask: Tensor | None, grad_out: Tensor) -> list[list[Tensor]]:
    """What torch's attention of the same dtype gives, for several orders of the features."""
    found = []
    for order in summation_orders(DIM):
        permuted = [inputs[0][..., order], inputs[1][..., order], inputs[2]]
        out, *grads = results(lambda x: in_torch(x, mask, case.is_causal), permuted, grad_out, case.gradients)
        grads[:2] = [grad[..., order.argsort()] for grad in grads[:2]]
        found.append([out, *grads])
    return found


def refusal(case: Combination) -> tuple[type[Exception], str] | None:
    """The error that a combination has to raise."""
    if case.is_causal and isinstance(MASKS[case.mask](case.dtype), CausalBias):
        return ValueError, "is_causal=True cannot be used together with an attn_mask that is a CausalBias"
    if case.mask == "bias of float16" and case.dtype != torch.float16:
        return (
            TypeError,
            rf"attn_mask must be a bool tensor .* or of the dtype of query, {case.dtype}; got torch.float16",
        )
    return None


def check(case: Combination) -> None:
    inputs, grad_out = inputs_of(case)
    mask = mask_of(case, inputs[0].dim())
    keywords: dict[str, Any] = {
        "blocks_per_row": math.inf,
        "attn_mask": mask,
        "is_causal": case.is_causal,
        "enable_gqa": case.enable_gqa,
    }

    def ours(x: list[Tensor]) -> Tensor:
        return scaled_dot_product_attention(*x, resolutions=(BLOCK_SIZE, 1), **keywords)

    refused = refusal(case)
    if refused is not None:
        with pytest.raises(refused[0], match=refused[1]):
            results(ours, inputs, grad_out, case.gradients)
        return
    actual = results(ours, inputs, grad_out, case.gradients)
    truth = [x.double() for x in inputs]
    expected = results(lambda x: in_torch(x, mask, case.is_causal), truth, grad_out.double(), case.gradients)
    names = ("out", "dq", "dk", "dv")[: len(actual)]
    assert all(x.dtype == case.dtype for x in actual)
    if case.dtype == torch.float64:
        for name, a, e in zip(names, actual, expected, strict=True):
            assert_close(a, e, name)
        return

    def floor() -> list[Tensor]:
        shared: dict[str, Any] = {"attn_mask": mask, "is_causal": case.is_causal, "enable_gqa": case.enable_gqa}
        return plain_float32.attention(*inputs, grad_out if case.gradients else None, **shared)

    budget = Budget(comparisons(case, inputs, mask, grad_out), floor)
    assert_results_within_budget(actual, expected, budget, names=names, block_size=BLOCK_SIZE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
def test_agrees_with_torch_or_is_refused(mask: str, layout: str) -> None:
    cases = [case for case in COMBINATIONS if case.mask == mask and case.layout == layout]
    assert len(cases) == 32
    for case in cases:
        check(case)


def test_the_walk_is_complete() -> None:
    assert len(set(COMBINATIONS)) == 14 * 6 * 4 * 2 * 2 * 2 == 2688
    equal = [case for case in COMBINATIONS if refusal(case) is None]
    of_causal_bias, of_float16 = 2 * 6 * 4 * 2 * 2, 6 * 3 * 2 * 2 * 2
    assert len(equal) == 2688 - of_causal_bias - of_float16


# Nothing is ignored

QUERY, KEY, VALUE = (_random(2, HEADS, 100, 8), _random(2, HEADS, 90, 8).flip(2), _random(2, HEADS, 90, 8).flip(3))
BASE: dict[str, Any] = {"resolutions": (8, 1), "blocks_per_row": 2.0}
UNPLANNED: dict[str, Any] = {"blocks_per_row": None}
GROUPED = {"key": KEY[:, :2], "value": VALUE[:, :2]}
# name: a value that is not the default, and what the call without it has already
UNUSUAL: dict[str, tuple[Any, dict[str, Any]]] = {
    "attn_mask": (torch.arange(90) < 50, {}),
    "dropout_p": (0.5, {}),
    "is_causal": (True, {}),
    "scale": (0.9, {}),
    "enable_gqa": (True, GROUPED),
    "resolutions": ((16, 1), {}),
    "blocks_per_row": (3.0, {}),
    "num_blocks": (40, {}),
    "mode": ("sparse", {}),
    "coarse": ("first_order", {}),
    "score": ("mean", {"pool_queries": False}),
    "coarse_shift": (0.7, {}),
    "first_blocks": (2, {}),
    "diagonal_blocks": (3, {}),
    "local_blocks": (2, {}),
    "query_padding_mask": (torch.arange(100) < 50, {}),
    "window_size": ((30, 20), {}),
    "plan": (plan(QUERY, KEY, resolutions=(8, 1), blocks_per_row=3), UNPLANNED),
    "pool_queries": (False, {}),
    "config": (MRAConfig(mode="sparse"), {}),
    "return_lse": (True, {}),
    "causal_alignment": ("lower_right", {"window_size": (30, 20)}),
    "softcap": (0.5, {}),
    "alibi_slopes": (torch.full((HEADS,), 0.3), {}),
    "sinks": (torch.full((HEADS,), 0.3), {}),
    "query_order": (torch.arange(100).view(10, 10).t().flatten(), {}),
    "key_order": (torch.arange(90).view(9, 10).t().flatten(), {}),
    "grid": ((9, 11), {"key": QUERY.flip(2), "value": QUERY.flip(3)}),
}
CAUSAL_UNUSUAL = {
    **{name: (value, {"is_causal": True} | base) for name, (value, base) in UNUSUAL.items()},
    "is_causal": (False, {"is_causal": True}),
    "plan": (
        plan(QUERY, KEY, is_causal=True, resolutions=(8, 1), blocks_per_row=3),
        {"is_causal": True} | UNPLANNED,
    ),
}
# A causal call is in the token form anyway.
MAKES_NO_DIFFERENCE = {"pool_queries", "coarse"}
NOT_CAUSAL = {"query_order", "key_order", "grid"}


def outcome(arguments: dict[str, Any]) -> Any:
    """The result, or the error; what is None is left out."""
    torch.manual_seed(0)
    given = {"query": QUERY, "key": KEY, "value": VALUE} | BASE | arguments
    try:
        return scaled_dot_product_attention(**{name: value for name, value in given.items() if value is not None})
    except (TypeError, ValueError, NotImplementedError) as error:
        return error


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", UNUSUAL)
def test_every_argument_counts(name: str, causal: bool) -> None:
    value, before = (CAUSAL_UNUSUAL if causal else UNUSUAL)[name]
    usual, unusual = outcome(before), outcome(before | {name: value})
    if causal and name in MAKES_NO_DIFFERENCE:
        assert torch.equal(usual, unusual)
    elif causal and name in NOT_CAUSAL:
        assert isinstance(unusual, ValueError)
        assert str(unusual).startswith("is_causal=True")
        assert name in str(unusual)
    elif name == "enable_gqa":
        assert isinstance(usual, ValueError)
        assert unusual.shape == usual_shape()
    elif name == "return_lse":
        assert isinstance(unusual, tuple)
        assert torch.equal(unusual[0], usual)
    else:
        assert unusual.shape == usual.shape
        assert unusual.isfinite().all()
        assert not torch.allclose(usual, unusual)


def usual_shape() -> tuple[int, ...]:
    return (*QUERY.shape[:3], VALUE.shape[3])


@pytest.mark.parametrize(
    "change", [Tensor.clone, Tensor.detach, lambda bias: bias[0]], ids=["clone", "detach", "index"]
)
def test_a_causal_bias_that_is_none_any_more(change: Callable[[Tensor], Tensor]) -> None:
    for make in (causal_upper_left, causal_lower_right):
        try:
            changed = change(make(100, 100))
        except NotImplementedError as error:  # torch 2.5 refuses such changes itself
            if "CausalBias only supports scaled_dot_product_attention" not in str(error):
                raise
            continue
        with pytest.raises(TypeError, match=r"attn_mask is a CausalBias that has lost its lengths.*causal_lower_right"):
            scaled_dot_product_attention(QUERY, QUERY, QUERY, attn_mask=changed)


def test_every_argument_was_tried() -> None:
    parameters = list(inspect.signature(scaled_dot_product_attention).parameters)
    assert set(parameters) == {"query", "key", "value", *UNUSUAL}


@pytest.mark.parametrize("function", [scaled_dot_product_attention, plan], ids=lambda f: f.__name__)
def test_every_argument_is_checked(function: Callable[..., Any]) -> None:
    """An object of no use is refused for every parameter, by the parameter's name."""
    for name in inspect.signature(function).parameters:
        arguments: dict[str, Any] = {"query": QUERY, "key": KEY, "value": VALUE}
        if function is plan:
            del arguments["value"]
        with pytest.raises(TypeError, match=rf"^{name} must"):
            function(**(arguments | {name: object()}))


def test_every_argument_of_the_cache_is_checked() -> None:
    cache = KVCache(2, HEADS, 8, dtype=torch.float64)
    calls: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (KVCache, {"batch_size": 2, "num_kv_heads": 4, "head_dim": 8}),
        (cache.append, {"key": KEY, "value": VALUE}),
        (cache.attend, {"query": QUERY}),
        (cache.reorder, {"indices": [0, 1]}),
        (cache.crop, {"lengths": 1}),
    ]
    for function, arguments in calls:
        names = [*inspect.signature(function).parameters]
        if names[-1] == "settings":
            names[-1:] = SETTINGS
        for name in names:
            with pytest.raises(TypeError, match=rf"^{name} must"):
                function(**(arguments | {name: object()}))
    assert cache.lengths == (0, 0)
