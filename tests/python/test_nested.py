"""Jagged nested tensors: the bits of the same sequences packed."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from mra_attention import can_run, plan, scaled_dot_product_attention, varlen_attention
from torch import Tensor
from varlen_cases import FORMS, KEY_LENGTHS, LENGTHS, by_form

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    # Dynamo reads .grad of tensors that are no leaves.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def nested(lengths: list[int], heads: int, channels: int) -> Tensor:
    """A leaf (B, j, heads, channels)."""
    return torch.nested.nested_tensor(
        [torch.randn(n, heads, channels) for n in lengths], layout=torch.jagged, requires_grad=True
    )


@by_form
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_nested_tensors(form, cross):
    leaf = nested(LENGTHS, 4, 12)
    key_leaf = nested(KEY_LENGTHS if cross else LENGTHS, 2, 12)
    if not cross:
        key_leaf = torch.nested.nested_tensor_from_jagged(torch.randn(sum(LENGTHS), 2, 12), leaf.offsets()).detach()
    value_leaf = torch.nested.nested_tensor_from_jagged(
        torch.randn(*key_leaf.values().shape[:2], 9), key_leaf.offsets()
    )
    leaves = [leaf, key_leaf.detach().requires_grad_(), value_leaf.detach().requires_grad_()]
    keywords = {"resolutions": (8, 1), "enable_gqa": True, "return_lse": True} | FORMS[form]
    out, lse = scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves), **keywords)
    assert out.is_nested
    assert out.layout is torch.jagged
    assert out.shape == (6, 4, leaf.shape[1], 9)
    assert lse.shape == (6, 4, leaf.shape[1])
    flat = [x.values().detach().requires_grad_() for x in leaves]
    expected, expected_lse = varlen_attention(*flat, leaf.offsets(), key_leaf.offsets(), **keywords)
    assert torch.equal(out.transpose(1, 2).values(), expected)
    assert torch.equal(lse.transpose(1, 2).values(), expected_lse.t())
    grads = torch.autograd.grad(out.transpose(1, 2).values().square().sum(), leaves)
    wanted = torch.autograd.grad(expected.square().sum(), flat)
    for grad, want in zip(grads, wanted, strict=True):
        assert torch.equal(grad.values(), want)


def test_nested_tensors_go_on_in_a_model():
    projection = torch.nn.Linear(16, 48)
    tokens = torch.nested.nested_tensor([torch.randn(n, 16) for n in LENGTHS], layout=torch.jagged)
    query, key, value = (x.unflatten(-1, (4, 4)).transpose(1, 2) for x in projection(tokens).chunk(3, -1))
    out = scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(-2)
    assert (out + tokens).shape == tokens.shape
    (out + tokens).values().sum().backward()
    assert projection.weight.grad is not None
    assert projection.weight.grad.isfinite().all()


def of_lengths(lengths: list[int]) -> Tensor:
    return nested(lengths, 4, 12).detach().transpose(1, 2)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_tensors_of_equal_lengths_made_one_by_one(compiled):
    torch.compiler.reset()
    query, key, value = (of_lengths(LENGTHS).requires_grad_() for _ in range(3))

    def attention(*tensors: Tensor) -> Tensor:
        return scaled_dot_product_attention(*tensors, resolutions=(8, 1), blocks_per_row=2)

    function = torch.compile(attention, fullgraph=True, backend="aot_eager") if compiled else attention
    out = function(query, key, value)
    flat = (x.transpose(1, 2).values() for x in (query, key, value))
    starts = query.offsets()
    expected = varlen_attention(*flat, starts, starts, resolutions=(8, 1), blocks_per_row=2)
    assert torch.equal(out.transpose(1, 2).values(), expected)
    assert (out + query).shape == query.shape
    grads = torch.autograd.grad(out.transpose(1, 2).values().sum(), (query, key, value))
    wanted = torch.autograd.grad(expected.sum(), (query, key, value))
    for grad, want in zip(grads, wanted, strict=True):
        assert torch.equal(grad.values(), want.values())
    with pytest.raises((ValueError, RuntimeError), match="key and value must have the same jagged lengths"):
        function(query, key, of_lengths(LENGTHS[::-1]))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_to_pad_the_results_pads_to_the_longest_sequence(compiled):
    torch.compiler.reset()

    def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return scaled_dot_product_attention(query, key, value, return_lse=True)

    function = torch.compile(attention, fullgraph=True, backend="aot_eager") if compiled else attention
    query, key, value = (of_lengths([7, 33, 12]) for _ in range(3))
    out, lse = function(query, key, value)
    assert out.transpose(1, 2).to_padded_tensor(0.0).shape == (3, 33, 4, 12)
    assert lse.transpose(1, 2).to_padded_tensor(0.0).shape == (3, 33, 4)


def test_heads_that_differ_in_number_are_sequences_of_their_own():
    """Jagged in dimension 1, as torch's own attention takes it: `(B, j, L, D)`."""
    query = nested([3, 0, 5], 20, 8)
    key, value = (torch.nested.nested_tensor_from_jagged(torch.randn(8, 29, 8), query.offsets()) for _ in range(2))
    out, lse = scaled_dot_product_attention(query, key, value, return_lse=True, blocks_per_row=math.inf)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert out.shape == theirs.shape
    torch.testing.assert_close(out.values(), theirs.values())
    assert lse.values().shape == (8, 20)
    settings: dict[str, Any] = {"resolutions": (8, 1), "blocks_per_row": 1}
    out = scaled_dot_product_attention(query, key, value, **settings)
    single = [
        scaled_dot_product_attention(*x, **settings)
        for x in zip(query.values(), key.values(), value.values(), strict=True)
    ]
    assert torch.equal(out.values(), torch.stack(single))
    (grad,) = torch.autograd.grad(out.values().sum(), query)
    assert grad.shape == query.shape


def test_can_run_says_of_nested_tensors_what_the_call_raises():
    for name, (given, error, _) in NESTED_REFUSED.items():
        arguments = {"query": JAGGED, "key": JAGGED, "value": JAGGED} | given
        with pytest.raises(error) as caught:
            scaled_dot_product_attention(**arguments)
        assert can_run(**arguments) == str(caught.value), name
    assert can_run(JAGGED, JAGGED, JAGGED, is_causal=True, window_size=(5, 0)) is None


def test_compile_of_nested_tensors():
    torch.compiler.reset()
    leaf = nested(LENGTHS, 4, 12).transpose(1, 2)

    def attention(query: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, query, query, is_causal=True)

    out = torch.compile(attention, fullgraph=True, backend="aot_eager")(leaf)
    assert torch.equal(out.values(), attention(leaf).values())


def strided_nested() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype, says torch
        return torch.nested.nested_tensor([torch.randn(4, 9, 8), torch.randn(4, 7, 8)])


JAGGED = nested([9, 7], 4, 8).detach().transpose(1, 2)
NESTED_REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "mask": ({"attn_mask": torch.ones(2, 1, 1, 9, dtype=torch.bool)}, ValueError, "attn_mask cannot .* nested"),
    "query mask": ({"query_padding_mask": torch.ones(2, 9, dtype=torch.bool)}, ValueError, "query_padding_mask cannot"),
    "plan": ({"plan": 1}, ValueError, "plan cannot be used with nested"),
    "dense key": ({"key": torch.randn(2, 4, 9, 8)}, TypeError, "key must be a nested tensor.* a dense tensor"),
    "list": ({"value": [1]}, TypeError, "value must be a nested tensor.* list"),
    "jagged dimensions": (
        {"value": JAGGED.transpose(1, 2)},
        ValueError,
        r"jagged in the same dimension, got dimensions \(2, 2, 1\)",
    ),
    "three dimensions": (
        {"query": nested([9, 7], 4, 8).detach().flatten(2)},
        ValueError,
        r"query must have the dimensions .* 3 dimensions .* dimension 1",
    ),
    "other number": (
        {"query": nested([9, 7, 3], 4, 8).detach().transpose(1, 2)},
        ValueError,
        "query must have as many sequences as key and value",
    ),
    "other lengths": ({"value": nested([7, 9], 4, 8).detach().transpose(1, 2)}, ValueError, "same jagged lengths"),
    "strided": (
        {"query": strided_nested()},
        NotImplementedError,
        "query is a nested tensor of layout torch.strided; only layout=torch.jagged",
    ),
    "num_blocks": ({"num_blocks": 0}, ValueError, "num_blocks must be an integer of at least 1"),
}


def test_plan_refuses_nested_tensors():
    with pytest.raises(NotImplementedError, match="query is a nested tensor, which is not supported here"):
        plan(JAGGED, JAGGED)


@pytest.mark.parametrize("name", NESTED_REFUSED)
def test_refuses_with_nested_tensors(name):
    given, error, words = NESTED_REFUSED[name]
    with pytest.raises(error, match=words):
        scaled_dot_product_attention(**({"query": JAGGED, "key": JAGGED, "value": JAGGED} | given))


def test_refuses_nested_tensors_with_gaps():
    starts, lengths = torch.tensor([0, 1]), torch.tensor([5, 7])
    query = torch.nested.narrow(torch.randn(2, 9, 4, 8), 1, starts, lengths, layout=torch.jagged)
    try:
        query = query.transpose(1, 2)
    except ValueError as error:  # torch 2.5 refuses it itself
        if "not supported on jagged layout nested tensor with holes" not in str(error):
            raise
        return
    with pytest.raises(ValueError, match=r"query has gaps .*query.contiguous\(\)"):
        scaled_dot_product_attention(query, JAGGED, JAGGED)
