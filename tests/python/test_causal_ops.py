"""Causal attention under torch's own tools: gradients, compile, torch.func, and what has no derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mra_attention import plan, scaled_dot_product_attention
from ops_cases import BLOCK_SIZE, SHAPES, detached, inputs
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradcheck
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

pytestmark = [
    # torch scripts functions of its own when forward mode is first used.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),
]
SETTINGS: dict[str, Any] = {"resolutions": (BLOCK_SIZE, 1), "blocks_per_row": 2.0}


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, **SETTINGS)


def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention(query, key, value).square().sum()


# Gradients


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_gradcheck_on_a_frozen_plan(shape, mode):
    tensors = inputs(shape)
    chosen = plan(*tensors[:2], is_causal=True, enable_gqa=True, **SETTINGS)

    def outputs(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        keywords = {"resolutions": (BLOCK_SIZE, 1), "plan": chosen, "mode": mode, "enable_gqa": True}
        return scaled_dot_product_attention(*tensors, is_causal=True, return_lse=True, **keywords)

    assert gradcheck(outputs, tensors)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradients_of_some_inputs_only(wanted):
    tensors = inputs()
    everything = torch.autograd.grad(loss(*tensors), tensors)
    some = [t if i in wanted else t.detach() for i, t in enumerate(tensors)]
    grads = torch.autograd.grad(loss(*some), [tensors[i] for i in wanted])
    for i, grad in zip(wanted, grads, strict=True):
        assert torch.equal(grad, everything[i])


def test_checkpoint():
    tensors = inputs()
    expected = torch.autograd.grad(loss(*tensors), tensors)
    repeated = checkpoint(loss, *tensors, use_reentrant=False)
    assert isinstance(repeated, Tensor)
    for grad, want in zip(torch.autograd.grad(repeated, tensors), expected, strict=True):
        assert torch.equal(grad, want)


# Compilers


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_takes_a_causal_bias():
    """Dynamo cannot construct one, but it takes one."""
    tensors = detached(inputs())
    bias = causal_lower_right(19, 27)

    def function(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, bias, **SETTINGS)

    traced = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(*tensors, bias), function(*tensors, bias))


@pytest.mark.skipif(torch.__version__.startswith("2.5."), reason="torch 2.5 traces a forward without context wrongly")
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_of_func_grad():
    tensors = detached(inputs())
    grads = torch.compile(torch.func.grad(loss, argnums=(0, 1, 2)), fullgraph=True, backend="aot_eager")(*tensors)
    for grad, want in zip(grads, torch.func.grad(loss, argnums=(0, 1, 2))(*tensors), strict=True):
        assert torch.equal(grad, want)


# torch.func


def test_func_grad():
    tensors = inputs("grouped")
    expected = torch.autograd.grad(loss(*tensors), tensors)
    for grad, want in zip(torch.func.grad(loss, argnums=(0, 1, 2))(*detached(tensors)), expected, strict=True):
        assert torch.equal(grad, want)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, 0, 0), (0, None, None), (-1, -1, -1)], ids=str)
def test_vmap(in_dims):
    batches = [
        tensor if dim is None else torch.stack([tensor, 2 * tensor, -tensor], dim)
        for tensor, dim in zip(detached(inputs()), in_dims, strict=True)
    ]
    out = torch.vmap(attention, in_dims)(*batches)
    expected = [
        attention(*(t if dim is None else t.select(dim, i) for t, dim in zip(batches, in_dims, strict=True)))
        for i in range(3)
    ]
    assert torch.equal(out, torch.stack(expected))


def test_vmap_of_plan():
    batches = [torch.stack([t, -t]) for t in detached(inputs())[:2]]
    chosen = torch.vmap(lambda query, key: plan(query, key, is_causal=True, **SETTINGS).data)(*batches)
    for i in range(2):
        assert torch.equal(chosen[i], plan(batches[0][i], batches[1][i], is_causal=True, **SETTINGS).data)


def test_jacrev_and_batched_gradients():
    query, key, value = detached(inputs("one-token")[:1] + inputs("long-row")[1:])
    query = torch.randn(1, 1, 2, 2, dtype=torch.float64)

    def of_query(query: Tensor) -> Tensor:
        bias = causal_lower_right(query.shape[2], key.shape[2])
        return scaled_dot_product_attention(query, key, value, bias, **SETTINGS)

    expected = torch.autograd.functional.jacobian(of_query, query)
    torch.testing.assert_close(torch.func.jacrev(of_query)(query), expected)
    torch.testing.assert_close(torch.autograd.functional.jacobian(of_query, query, vectorize=True), expected)


# What has no derivative raises


def test_double_backward_raises():
    query, key, value = inputs()
    (grad,) = torch.autograd.grad(loss(query, key, value), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_double_backward_of_torch_func_raises():
    query, key, value = detached(inputs())
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.func.grad(lambda query: torch.func.grad(loss)(query, key, value).sum())(query)


def test_jvp_raises():
    query, key, value = detached(inputs())
    with pytest.raises(NotImplementedError, match="no forward-mode automatic differentiation"):
        torch.func.jvp(lambda query: attention(query, key, value), (query,), (query,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(key, key)
        with pytest.raises(NotImplementedError, match="no forward-mode automatic differentiation"):
            attention(query, dual, value)


def test_a_plan_has_no_gradient():
    query, key, _ = inputs()
    chosen = plan(query, key, is_causal=True, **SETTINGS)
    assert not chosen.data.requires_grad
