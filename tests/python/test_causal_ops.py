"""The causal operators under torch's own tools: opcheck, compile, export, torch.func, and what has no derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mra_attention import CausalPlan, plan, scaled_dot_product_attention
from ops_cases import BLOCK_SIZE, LAYOUTS, OPS, SHAPES, detached, inputs, lay_out
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradcheck
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

pytestmark = [
    # opcheck itself reads .grad of tensors that are no leaves.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # torch scripts functions of its own when forward mode is first used.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),
]
SETTINGS: dict[str, Any] = {"resolutions": (BLOCK_SIZE, 1), "blocks_per_row": 2.0}


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, **SETTINGS)


def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention(query, key, value).square().sum()


def forward_arguments(shape: str, layout: str, given_plan: bool, sparse: bool, per_item: bool) -> tuple[Any, ...]:
    tensors = inputs(shape, layout=layout)
    batch, length = tensors[0].shape[0], tensors[1].shape[2]
    offsets = list(range(batch)) if per_item else [3]
    lengths = [length - item for item in range(batch)] if per_item else None
    numbers = (offsets, lengths, 0.3, BLOCK_SIZE, sparse, 2, 1, 0, 0.0)
    chosen = OPS.causal_forward(*detached(tensors), None, None, *numbers)[2] if given_plan else None
    return *tensors, chosen, None, *numbers


by_shape_and_layout = pytest.mark.parametrize(
    ("shape", "layout"),
    [(shape, "contiguous") for shape in SHAPES] + [("ragged", layout) for layout in LAYOUTS if layout != "contiguous"],
)


@by_shape_and_layout
@pytest.mark.parametrize(("given_plan", "sparse"), [(False, False), (True, True)], ids=["full", "sparse-given-plan"])
def test_opcheck_of_forward(shape, layout, given_plan, sparse):
    arguments = forward_arguments(shape, layout, given_plan, sparse, per_item=given_plan)
    results = torch.library.opcheck(OPS.causal_forward.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@by_shape_and_layout
@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "lse"])
def test_opcheck_of_backward(shape, layout, with_lse):
    arguments = forward_arguments(shape, layout, False, False, per_item=with_lse)
    with torch.no_grad():
        out, lse, chosen = OPS.causal_forward(*arguments)
    grads = (lay_out(torch.randn_like(out), layout), torch.randn_like(lse) if with_lse else None)
    numbers = (*arguments[5:10], 0.0)
    tensors = (*arguments[:3], out, lse, chosen, None)
    results = torch.library.opcheck(
        OPS.causal_backward.default, (*grads, *detached(list(tensors[:3])), *tensors[3:], *numbers)
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (0, torch.randn(2, 2, 16, 3, dtype=torch.float64)),
        (1, torch.randn(2, 16, 4, dtype=torch.float64)),
        (1, torch.randn(2, 2, 16, 4)),
        (2, torch.randn(2, 2, 15, 4, dtype=torch.float64)),
        (3, torch.zeros(2, 2, 16, 2)),
        (3, torch.zeros(2, 2, 15, 2, dtype=torch.int32)),
        (5, [1, 2, 3]),
        (5, []),
        (6, [17]),
        (6, [16, -1]),
        (6, [16, 16, 16]),
        (7, float("nan")),
        (8, 0),
        (8, 129),
        (10, -1),
        (11, -1),
        (12, -1),
    ],
)
def test_the_operator_survives_wrong_arguments(place, wrong):
    arguments = list(forward_arguments("blocks", "contiguous", False, False, False))
    arguments[place] = wrong
    with pytest.raises((ValueError, TypeError, IndexError, RuntimeError, OverflowError)), torch.no_grad():
        OPS.causal_forward(*arguments)


def test_a_tensor_of_another_device_is_refused_by_the_operator():
    arguments = list(forward_arguments("blocks", "contiguous", True, False, False))
    arguments[3] = arguments[3].to("meta")
    with pytest.raises(ValueError, match="same device"):
        OPS.causal_forward(*arguments)


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

COMPILED = {
    "plain": attention,
    "sparse": lambda q, k, v: scaled_dot_product_attention(q, k, v, mode="sparse", is_causal=True, **SETTINGS),
    "lse": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, return_lse=True, **SETTINGS)[1],
    "plan": lambda q, k, v: scaled_dot_product_attention(
        q, k, v, is_causal=True, resolutions=(BLOCK_SIZE, 1), plan=plan(q, k, is_causal=True, **SETTINGS)
    ),
    "local": lambda q, k, v: scaled_dot_product_attention(
        q, k, v, is_causal=True, local_blocks=2, first_blocks=1, **SETTINGS
    ),
}


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("backend", "name", "dynamic"),
    [("aot_eager", name, dynamic) for name in COMPILED for dynamic in (False, True)] + [("inductor", "plain", True)],
)
def test_compile(backend, name, dynamic):
    function = COMPILED[name]
    traced = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    for shape in ["ragged", "long-row"] if dynamic else ["ragged"]:
        tensors = inputs(shape)
        out, expected = traced(*tensors), function(*tensors)
        assert torch.equal(out, expected)
        assert out.stride() == expected.stride()
        cotangent = torch.randn_like(expected)
        grads = torch.autograd.grad(out, tensors, cotangent, allow_unused=True)
        wanted = torch.autograd.grad(expected, tensors, cotangent, allow_unused=True)
        for grad, want in zip(grads, wanted, strict=True):
            assert torch.equal(torch.zeros(()) if grad is None else grad, torch.zeros(()) if want is None else want)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_takes_a_causal_bias():
    """Dynamo cannot construct one, but it takes one."""
    tensors = detached(inputs())
    bias = causal_lower_right(19, 27)

    def function(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, bias, **SETTINGS)

    traced = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(*tensors, bias), function(*tensors, bias))


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_takes_and_returns_plans():
    tensors = detached(inputs())
    chosen = plan(*tensors[:2], is_causal=True, **SETTINGS)
    returned = torch.compile(lambda q, k: plan(q, k, is_causal=True, **SETTINGS), fullgraph=True, backend="aot_eager")(
        *tensors[:2]
    )
    assert isinstance(returned, CausalPlan)
    assert torch.equal(returned.blocks, chosen.blocks)
    assert (returned.key_length, returned.block_size, returned.offset) == (27, BLOCK_SIZE, 0)


@pytest.mark.skipif(torch.__version__.startswith("2.5."), reason="torch 2.5 traces a forward without context wrongly")
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_of_func_grad():
    tensors = detached(inputs())
    grads = torch.compile(torch.func.grad(loss, argnums=(0, 1, 2)), fullgraph=True, backend="aot_eager")(*tensors)
    for grad, want in zip(grads, torch.func.grad(loss, argnums=(0, 1, 2))(*tensors), strict=True):
        assert torch.equal(grad, want)


class Attention(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value)


def test_export_of_any_length():
    # From two key blocks on, a plan has room for two blocks; torch specializes on sizes of one.
    length = torch.export.Dim("length", min=2 * BLOCK_SIZE, max=4096)
    tensors = tuple(torch.randn(1, 2, 100, 4) for _ in range(3))
    shapes = ({2: length}, {2: length}, {2: length})
    program = torch.export.export(Attention(), tensors, dynamic_shapes=shapes, strict=False)
    assert [node.target for node in program.graph.nodes].count(OPS.causal_forward.default) == 1
    for other in (72, 101, 333):
        tensors = tuple(torch.randn(1, 2, other, 4) for _ in range(3))
        assert torch.equal(program.module()(*tensors), attention(*tensors))


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


def test_vmap_of_items_with_their_own_positions():
    """Lists of numbers for each item are repeated for each map; the transform comes in through the public functions."""
    from mra_attention import _causal_ops

    batches = [torch.stack([t, -t, 3 * t]) for t in detached(inputs("grouped"))]
    numbers = ([0, 7], [20, 13], 0.3, BLOCK_SIZE, False, 2, 1, 0, 0.0)

    def forward(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return _causal_ops.causal_forward(*tensors, None, None, *numbers)[:2]

    actual = torch.vmap(forward)(*batches)
    expected = [forward(*(t[i] for t in batches)) for i in range(3)]
    for got, want in zip(actual, zip(*expected, strict=True), strict=True):
        assert torch.equal(got, torch.stack(want))

    def total(*tensors: Tensor) -> Tensor:
        return forward(*tensors)[0].square().sum()

    grads = torch.vmap(torch.func.grad(total, argnums=(0, 1, 2)))(*batches)
    for i in range(3):
        leaves = [t[i].clone().requires_grad_() for t in batches]
        for grad, want in zip(grads, torch.autograd.grad(total(*leaves), leaves), strict=True):
            assert torch.equal(grad[i], want)


def test_vmap_of_plan():
    batches = [torch.stack([t, -t]) for t in detached(inputs())[:2]]
    chosen = torch.vmap(lambda query, key: plan(query, key, is_causal=True, **SETTINGS).blocks)(*batches)
    for i in range(2):
        assert torch.equal(chosen[i], plan(batches[0][i], batches[1][i], is_causal=True, **SETTINGS).blocks)


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
    assert not chosen.blocks.requires_grad
