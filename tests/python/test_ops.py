"""The operators: registration, layouts, what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mra_attention import scaled_dot_product_attention
from ops_cases import BLOCK_SIZE, LAYOUTS, OPS, SETTINGS, SHAPES, by_mask, detached, inputs, lay_out, masks

# opcheck itself reads .grad of tensors that are no leaves.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def pair_bias(shape: str, masked: bool) -> torch.Tensor | None:
    """Half of the pairs hidden, the others biased, the same for all heads."""
    if not masked:
        return None
    batch, _, _, query_length, key_length, _, _ = SHAPES[shape]
    bias = torch.randn(batch, 1, query_length, key_length)
    return bias.masked_fill(torch.rand(query_length, key_length) < 0.5, -torch.inf)


def rate(masked: bool) -> float:
    return 0.25 if masked else 0.0


def forward_arguments(shape: str, layout: str, masked: bool, given_plan: bool, sparse: bool) -> tuple[Any, ...]:
    tensors = inputs(shape, layout=layout)
    key_mask, query_mask = masks(shape, masked)
    numbers = (0.3, BLOCK_SIZE, 1.5, None, 0, 0)
    chosen = (
        OPS.select_blocks(*tensors[:2], key_mask, query_mask, pair_bias(shape, masked), *numbers)
        if given_plan
        else None
    )
    bias, seed = pair_bias(shape, masked), torch.tensor([5]) if masked else None
    return *tensors, key_mask, query_mask, bias, chosen, seed, 0.3, BLOCK_SIZE, sparse, rate(masked), 1.5, None, 0, 0


# Every shape, and every layout of one shape.
by_shape_and_layout = pytest.mark.parametrize(
    ("shape", "layout"),
    [(shape, "contiguous") for shape in SHAPES] + [("ragged", layout) for layout in LAYOUTS if layout != "contiguous"],
)


@by_shape_and_layout
@by_mask
@pytest.mark.parametrize(("given_plan", "sparse"), [(False, False), (True, True)], ids=["full", "sparse-given-plan"])
def test_opcheck_of_forward(shape, layout, masked, given_plan, sparse):
    arguments = forward_arguments(shape, layout, masked, given_plan, sparse)
    results = torch.library.opcheck(OPS.forward.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@by_shape_and_layout
@by_mask
def test_opcheck_of_select_blocks(shape, layout, masked):
    tensors = inputs(shape, layout=layout)
    arguments = (*tensors[:2], *masks(shape, masked), pair_bias(shape, masked), 0.3, BLOCK_SIZE, 1.5, 3, 1, 1)
    results = torch.library.opcheck(OPS.select_blocks.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@by_shape_and_layout
@by_mask
@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "lse"])
def test_opcheck_of_backward(shape, layout, masked, with_lse):
    arguments = forward_arguments(shape, layout, masked, False, False)
    with torch.no_grad():
        out, lse, chosen = OPS.forward(*arguments)
    query, key, value, key_mask, query_mask, bias, _, seed = arguments[:8]
    grad_lse = torch.randn_like(lse) if with_lse else None
    grads = (lay_out(torch.randn_like(out), layout), grad_lse)
    rest = (key_mask, query_mask, bias, chosen, seed, 0.3, BLOCK_SIZE, False, rate(masked))
    results = torch.library.opcheck(OPS.backward.default, (*grads, *detached([query, key, value]), out, lse, *rest))
    assert set(results.values()) == {"SUCCESS"}
    # With inputs that require gradients, test_aot_dispatch_dynamic would ask for the second derivative.
    results = torch.library.opcheck(
        OPS.backward.default,
        (*grads, query, key, value, out, lse, *rest),
        test_utils=["test_schema", "test_autograd_registration", "test_faketensor"],
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_output_is_stored_like_the_query(layout):
    query, key, value = inputs("grouped", layout=layout)
    out = scaled_dot_product_attention(query, key, value, enable_gqa=True, **SETTINGS)
    flat = out.transpose(1, 2).flatten(2)
    assert (flat.data_ptr() == out.data_ptr()) == (layout in {"heads-inside"})
    assert out.is_contiguous() == (layout != "heads-inside")
    for tensor, grad in zip((query, key), torch.autograd.grad(out.sum(), (query, key)), strict=True):
        assert grad.shape == tensor.shape
        assert grad.is_contiguous() == (layout != "heads-inside")


def test_a_tensor_of_another_device_is_refused_by_the_operator():
    arguments = list(forward_arguments("blocks", "contiguous", False, False, False))
    arguments[3] = torch.ones(2, 16, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match="same device"):
        OPS.forward(*arguments)


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (0, torch.randn(2, 2, 16, 3, dtype=torch.float64)),
        (1, torch.randn(2, 16, 4, dtype=torch.float64)),
        (1, torch.randn(2, 2, 16, 4)),
        (2, torch.randn(2, 2, 15, 4, dtype=torch.float64)),
        (3, torch.ones(2, 15, dtype=torch.bool)),
        (3, torch.ones(2, 16)),
        (4, torch.ones(3, 16, dtype=torch.bool)),
        (5, torch.ones(2, 2, 16, 15, dtype=torch.bool)),
        (5, torch.ones(2, 2, 16, 16, dtype=torch.int64)),
        (5, torch.ones(1, 2, 2, 16, 16)),
        (6, torch.zeros(2, 2, 2, 2, dtype=torch.uint8)),
        (6, torch.zeros(2, 2, 1, 1, dtype=torch.uint8)),
        (6, torch.zeros(2, 2, 2, 1)),
        (8, float("nan")),
        (9, 0),
        (9, 129),
        (11, float("nan")),
        (11, -0.5),
        (11, 1.5),
        (12, float("nan")),
        (12, -1.0),
        (14, -1),
    ],
)
def test_the_operator_survives_wrong_arguments(place, wrong):
    """The native module checks again what the public functions have checked."""
    arguments = list(forward_arguments("blocks", "contiguous", False, False, False))
    arguments[place] = wrong
    with pytest.raises((ValueError, TypeError, IndexError, RuntimeError, OverflowError)), torch.no_grad():
        OPS.forward(*arguments)
