"""Gradients, and what has none."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from mra_attention import Plan, plan, scaled_dot_product_attention
from ops_cases import (
    BLOCK_SIZE,
    LAYOUTS,
    OPS,
    SETTINGS,
    attention,
    by_mask,
    by_mode,
    by_shape,
    detached,
    inputs,
    keywords,
    lay_out,
    loss,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradcheck
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# torch scripts functions of its own when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")


def frozen(shape: str, chosen: Plan, keep: dict[str, Any]) -> Any:
    names = ("attn_mask", "query_padding_mask", "enable_gqa", "mode")
    fixed = {name: keep[name] for name in names} | {"resolutions": (BLOCK_SIZE, 1), "plan": chosen}

    def outputs(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = scaled_dot_product_attention(query, key, value, return_lse=True, **fixed)
        return out, lse.masked_fill(lse.isinf(), 0.0)

    return outputs


@by_shape
@by_mode
@by_mask
def test_gradcheck_on_a_frozen_plan(shape, mode, masked):
    tensors = inputs(shape)
    keep = keywords(shape, masked, mode)
    chosen = plan(*tensors[:2], **keep)
    assert gradcheck(frozen(shape, chosen, keep), tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_of_other_layouts(layout):
    tensors = inputs("ragged")
    chosen = plan(*tensors[:2], **SETTINGS)
    keep = keywords("ragged", False)

    def laid_out(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return frozen("ragged", chosen, keep)(*(lay_out(leaf, layout) for leaf in leaves))

    assert gradcheck(laid_out, tensors)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradients_of_some_inputs_only(wanted):
    tensors = inputs()
    everything = torch.autograd.grad(loss(*tensors), tensors)
    some = [t if i in wanted else t.detach() for i, t in enumerate(tensors)]
    grads = torch.autograd.grad(loss(*some), [tensors[i] for i in wanted])
    for i, grad in zip(wanted, grads, strict=True):
        assert torch.equal(grad, everything[i])


def test_gradients_of_lse_only():
    query, key, value = inputs()
    _, lse = scaled_dot_product_attention(query, key, value, return_lse=True, **SETTINGS)
    grads = torch.autograd.grad(lse.sum(), (query, key, value))
    out, lse = scaled_dot_product_attention(query, key, value, return_lse=True, **SETTINGS)
    both = torch.autograd.grad((out, lse), (query, key, value), (torch.zeros_like(out), torch.ones_like(lse)))
    for grad, other in zip(grads, both, strict=True):
        assert torch.equal(grad, other)
    assert (grads[2] == 0).all()
    assert (grads[0] != 0).any()


def test_a_plan_has_no_gradient():
    query, key, _ = inputs()
    chosen = plan(query, key, **SETTINGS)
    assert not chosen.data.requires_grad
    assert chosen.data.grad_fn is None


def test_changing_an_input_before_backward_is_noticed():
    query, key, value = inputs()
    scaled = query * 1.0
    out = attention(scaled, key, value)
    scaled.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_output_may_be_changed_in_place():
    query, key, value = inputs(layout="heads-inside")
    out = attention(query, key, value) * 1.0
    expected = torch.autograd.grad((out + 1.0).square().sum(), query)
    changed = attention(query, key, value)
    changed.add_(1.0)  # a view made inside a custom function would refuse this
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # backward reads the output
        changed.square().sum().backward()
    clone = attention(query, key, value).clone()
    clone.add_(1.0)
    assert torch.equal(torch.autograd.grad(clone.square().sum(), query)[0], expected[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    tensors = inputs()
    expected = torch.autograd.grad(loss(*tensors), tensors)
    repeated = checkpoint(loss, *tensors, use_reentrant=use_reentrant)
    assert isinstance(repeated, Tensor)
    repeated.backward()
    for tensor, want in zip(tensors, expected, strict=True):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, want)


def test_selective_checkpoint_sees_the_operator():
    tensors = inputs()
    expected = torch.autograd.grad(loss(*tensors), tensors)
    seen = []

    def policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        seen.append((operator, context.is_recompute))
        save = operator is OPS.forward.default
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    repeated = checkpoint(loss, *tensors, use_reentrant=False, context_fn=contexts)
    assert isinstance(repeated, Tensor)
    grads = torch.autograd.grad(repeated, tensors)
    assert seen.count((OPS.forward.default, False)) == 1
    for grad, want in zip(grads, expected, strict=True):
        assert torch.equal(grad, want)


def test_the_profiler_sees_the_operators():
    tensors = inputs()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss(*tensors).backward()
    names = [event.key for event in profile.key_averages()]
    assert "mra_attention::forward" in names
    assert "mra_attention::backward" in names


def test_inference_mode():
    tensors = inputs()
    with torch.inference_mode():
        out = attention(*tensors)
    assert out.is_inference()
    assert torch.equal(out, attention(*tensors).detach())


# What has no derivative raises


def test_double_backward_raises():
    query, key, value = inputs()
    (grad,) = torch.autograd.grad(loss(query, key, value), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_double_backward_of_torch_func_raises():
    query, key, value = detached(inputs())

    def slope(query: Tensor) -> Tensor:
        return torch.func.grad(loss)(query, key, value).sum()

    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.func.grad(slope)(query)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_jvp_raises(place):
    tensors = detached(inputs())

    def of_one(tensor: Tensor) -> Tensor:
        return attention(*tensors[:place], tensor, *tensors[place + 1 :])

    with pytest.raises(NotImplementedError, match="no forward-mode automatic differentiation"):
        torch.func.jvp(of_one, (tensors[place],), (torch.ones_like(tensors[place]),))


def test_jacfwd_and_hessian_raise():
    query, key, value = detached(inputs())
    with pytest.raises(NotImplementedError):
        torch.func.jacfwd(lambda query: attention(query, key, value))(query)
    with pytest.raises(NotImplementedError):
        torch.func.hessian(lambda query: loss(query, key, value))(query)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("recorded", [False, True], ids=["no-grad", "grad"])
def test_forward_mode_raises(place, recorded):
    tensors = inputs() if recorded else detached(inputs())
    with forward_ad.dual_level():
        tensors[place] = forward_ad.make_dual(tensors[place], torch.ones_like(tensors[place]))
        with pytest.raises(NotImplementedError, match="no forward-mode automatic differentiation"):
            attention(*tensors)


def test_forward_mode_of_the_backward_raises():
    tensors = inputs()
    out = attention(*tensors)
    with forward_ad.dual_level():
        grad_out = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(NotImplementedError, match="no forward-mode automatic differentiation"):
            torch.autograd.grad(out, tensors, grad_out)


def test_a_forward_mode_level_without_tangents_is_no_obstacle():
    tensors = detached(inputs())
    expected = attention(*tensors)
    with forward_ad.dual_level():
        assert torch.equal(attention(*tensors), expected)
