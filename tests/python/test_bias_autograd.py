"""A bias that requires a gradient in torch: what records it, torch.func, torch.compile, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import mra_attention
import pytest
import torch
from mra_attention import can_run, scaled_dot_product_attention
from mra_attention._ops import Inputs, Settings
from mra_attention._ops.arguments import for_backward
from ops_cases import OPS, SETTINGS, detached, inputs
from torch import Tensor
from torch.autograd import forward_ad

# torch scripts functions of its own when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")
FORMS = {"block": {}, "token": {"is_causal": True}}
by_form = pytest.mark.parametrize("form", FORMS)


def bias_of(*sizes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(sizes, dtype=dtype, requires_grad=True)


def loss(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, **more: Any) -> Tensor:
    return scaled_dot_product_attention(query, key, value, bias, **SETTINGS, **more).square().sum()


@by_form
def test_the_bias_alone_may_require_a_gradient(form: str) -> None:
    tensors, bias = inputs(), bias_of(2, 19, 27)
    everything = torch.autograd.grad(loss(*tensors, bias, **FORMS[form]), (*tensors, bias))
    (alone,) = torch.autograd.grad(loss(*detached(tensors), bias, **FORMS[form]), bias)
    assert torch.equal(alone, everything[3])
    others = torch.autograd.grad(loss(*tensors, bias.detach(), **FORMS[form]), tensors)
    for grad, want in zip(others, everything[:3], strict=True):
        assert torch.equal(grad, want)


def test_nothing_is_recorded_without_need() -> None:
    tensors, bias = detached(inputs()), bias_of(2, 19, 27)
    with torch.no_grad():
        assert not loss(*tensors, bias).requires_grad
    assert not loss(*tensors, bias.detach()).requires_grad
    assert loss(*tensors, bias).requires_grad


def test_the_operator_allocates_no_gradient_that_nobody_wants() -> None:
    tensors, bias = inputs(), bias_of(1, 2, 19, 27)
    given = Inputs(*detached(tensors), attn_bias=bias.detach())
    settings = Settings(scale=0.3, block_sizes=[8])
    out, lse, plan = OPS.forward(*given, *settings)
    rest = for_backward(given, out, lse, plan)
    unwanted = OPS.backward(out, None, *rest, False, *settings)
    wanted = OPS.backward(out, None, *rest, True, *settings)
    assert unwanted[3].shape == (0,)
    assert wanted[3].shape == bias.shape
    for a, b in zip(unwanted[:3], wanted[:3], strict=True):
        assert torch.equal(a, b)
    for other in (None, bias.detach() > 0):
        masked = for_backward(given._replace(attn_bias=other), out, lse, plan)
        with pytest.raises(ValueError, match="wants_grad_bias=True, but attn_bias is"):
            OPS.backward(out, None, *masked, True, *settings)


def test_leading_dimensions_of_the_inputs() -> None:
    query, key, value = (torch.randn(3, 2, 2, 20, 4, dtype=torch.float64) for _ in range(3))
    flat = [x.flatten(0, 1) for x in (query, key, value)]
    for shape in ((20,), (20, 20), (2, 20, 20), (2, 1, 20, 20), (3, 1, 2, 20, 20), (3, 2, 2, 20, 20)):
        bias = bias_of(*shape)
        (grad,) = torch.autograd.grad(loss(query, key, value, bias), bias)
        whole = bias.detach().expand(3, 2, 2, 20, 20).flatten(0, 1).clone().requires_grad_()
        (of_whole,) = torch.autograd.grad(loss(*flat, whole), whole)
        torch.testing.assert_close(grad, of_whole.unflatten(0, (3, 2)).sum_to_size(shape))
    bias = bias_of(20, 20)
    one_head = [x[0, 0, 0] for x in (query, key, value)]
    assert torch.autograd.grad(loss(*one_head, bias), bias)[0].shape == (20, 20)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_no_tokens(lengths: tuple[int, int]) -> None:
    query, key = (torch.randn(2, 2, length, 4) for length in lengths)
    for shape in (lengths, (2, 1, *lengths), (2, 1, 1, lengths[1])):
        bias = bias_of(*shape, dtype=torch.float32)
        (grad,) = torch.autograd.grad(scaled_dot_product_attention(query, key, key, bias).sum(), bias)
        assert torch.equal(grad, torch.zeros(shape))


def test_a_bias_that_the_caller_has_expanded() -> None:
    """Each element of an expanded bias has its own gradient, as in torch, and their sum comes to what was expanded."""
    tensors, bias = detached(inputs("blocks")), bias_of(1, 2, 16, 16)
    expanded = bias.expand(2, -1, -1, -1)
    of_expanded, of_bias = torch.autograd.grad(loss(*tensors, expanded), (expanded, bias))
    whole = bias.detach().expand(2, -1, -1, -1).clone().requires_grad_()
    assert torch.equal(of_expanded, torch.autograd.grad(loss(*tensors, whole), whole)[0])
    assert torch.equal(of_bias, of_expanded.sum(0, keepdim=True))
    torch.testing.assert_close(of_bias, torch.autograd.grad(loss(*tensors, bias), bias)[0])


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_layouts(layout: str) -> None:
    tensors = detached(inputs("blocks"))
    bias = bias_of(2, 16, 16)
    laid_out = (
        bias.transpose(1, 2).contiguous().transpose(1, 2) if layout == "transposed" else bias.repeat(1, 1, 2)[..., :16]
    )
    (grad,) = torch.autograd.grad(loss(*tensors, laid_out), bias)
    assert torch.equal(grad, torch.autograd.grad(loss(*tensors, bias), bias)[0])


def test_autocast() -> None:
    tensors, bias = detached(inputs(dtype=torch.float32)), bias_of(2, 19, 27, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = scaled_dot_product_attention(*tensors, bias, **SETTINGS)
    assert out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out.float().square().sum(), bias)
    assert grad.dtype == torch.float32
    rounded = bias.detach().bfloat16().requires_grad_()
    same = scaled_dot_product_attention(*(x.bfloat16() for x in tensors), rounded, **SETTINGS)
    assert torch.equal(grad, torch.autograd.grad(same.float().square().sum(), rounded)[0].float())


def test_a_change_before_backward_is_noticed() -> None:
    tensors, bias = detached(inputs()), bias_of(2, 19, 27)
    given = bias * 1.0
    out = loss(*tensors, given)
    given.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_a_plan_keeps_no_graph() -> None:
    tensors, bias = inputs(), bias_of(2, 19, 27)
    plan = mra_attention.plan(*tensors[:2], bias * 2.0, **SETTINGS)
    assert not any(mask is not None and mask.requires_grad for mask in plan.masks)


def test_it_can_run() -> None:
    tensors, bias = inputs(), bias_of(2, 19, 27)
    assert can_run(*tensors, bias) is None
    assert can_run(*tensors, bias, is_causal=True) is None


@by_form
def test_func_grad(form: str) -> None:
    tensors = detached(inputs())
    for shape in ((2, 19, 27), (19, 27), (27,), (1, 2, 1, 1)):
        bias = bias_of(*shape)
        (expected,) = torch.autograd.grad(loss(*tensors, bias, **FORMS[form]), bias)
        actual = torch.func.grad(loss, argnums=3)(*tensors, bias.detach(), **FORMS[form])
        assert torch.equal(actual, expected)
        out, pull = torch.func.vjp(lambda x: loss(*tensors, 2 * x, **FORMS[form]), bias.detach() / 2)
        assert torch.equal(pull(torch.ones_like(out))[0], 2 * expected)


@by_form
@pytest.mark.parametrize("dim", [None, 0, -1])
def test_vmap_of_grad(form: str, dim: int | None) -> None:
    """Each map has its own gradient, of a bias that is mapped and of one that is not."""
    tensors = [torch.stack([x, 2 * x, -x]) for x in detached(inputs("blocks"))]
    for shape in ((2, 2, 16, 16), (1, 2, 16, 16), (16, 16), (2, 1, 1, 16)):
        bias = bias_of(*shape).detach()
        given = bias if dim is None else torch.stack([bias, 2 * bias, -bias], dim)

        def of_bias(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
            return torch.func.grad(loss, argnums=3)(query, key, value, bias, **FORMS[form])

        actual = torch.vmap(of_bias, (0, 0, 0, dim))(*tensors, given)
        for i in range(3):
            expected = of_bias(*(x[i] for x in tensors), given if dim is None else given.select(dim, i))
            torch.testing.assert_close(actual[i], expected)


def test_jacrev_and_batched_gradients() -> None:
    query, key, value = detached(inputs("long-row"))
    bias = bias_of(1, 75).detach()

    def of_bias(bias: Tensor) -> Tensor:
        return scaled_dot_product_attention(query[:, :, :2], key, value, bias, **SETTINGS)

    expected = torch.autograd.functional.jacobian(of_bias, bias)
    torch.testing.assert_close(torch.func.jacrev(of_bias)(bias), expected)
    torch.testing.assert_close(torch.autograd.functional.jacobian(of_bias, bias, vectorize=True), expected)


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True])
@by_form
def test_compile(form: str, dynamic: bool) -> None:
    def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, bias, **SETTINGS, **FORMS[form])

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lengths in [(19, 27), (33, 41)] if dynamic else [(19, 27)]:
        query, key, value = (torch.randn(2, 2, lengths[i], 4, requires_grad=True) for i in (0, 1, 1))
        bias = bias_of(2, *lengths, dtype=torch.float32)
        for leaves in ((query, key, value, bias), (bias,)):
            given = leaves if len(leaves) > 1 else (*detached([query, key, value]), bias)
            actual = torch.autograd.grad(compiled(*given).square().sum(), leaves)
            expected = torch.autograd.grad(attention(*given).square().sum(), leaves)
            for a, e in zip(actual, expected, strict=True):
                assert torch.equal(a, e)


def test_what_has_no_derivative_is_refused() -> None:
    tensors, bias = detached(inputs()), bias_of(2, 19, 27)
    (grad,) = torch.autograd.grad(loss(*tensors, bias), bias, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(bias.detach(), torch.ones_like(bias))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            loss(*tensors, dual)


def test_a_number_that_is_hidden_from_all_stays_without_gradient() -> None:
    tensors = detached(inputs("blocks"))
    for hidden in (-math.inf, torch.finfo(torch.float64).min):
        bias = torch.zeros(16, 16, dtype=torch.float64).masked_fill(torch.ones(16, 16).tril() == 0, hidden)
        bias.requires_grad_()
        (grad,) = torch.autograd.grad(loss(*tensors, bias), bias)
        assert (grad.triu(1) == 0).all()
        assert (grad.tril() != 0).any()
