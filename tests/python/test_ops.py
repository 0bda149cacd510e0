"""The operators: registration, layouts, what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mra_attention import scaled_dot_product_attention
from mra_attention._ops import Inputs, Settings
from mra_attention._ops.arguments import for_backward, for_select
from ops_cases import BLOCK_SIZE, LAYOUTS, OPS, SETTINGS, SHAPES, by_mask, inputs, lay_out, masks

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


FORMS = {
    "block": {},
    "block-given-plan": {"sparse": True},
    "causal": {"window_right": 0},
    "causal-given-plan": {"window_right": 0, "sparse": True, "lower_right": True},
    "window": {"window_left": 9, "window_right": 4, "blocks_per_row": [math.inf]},
}
by_form = pytest.mark.parametrize("form", FORMS)
QUICK = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}


def forward_arguments(shape: str, layout: str, masked: bool, form: str) -> tuple[Inputs, Settings]:
    tensors = inputs(shape, layout=layout)
    key_mask, query_mask = masks(shape, masked)
    given = Inputs(*tensors, key_mask=key_mask, query_mask=query_mask, attn_bias=pair_bias(shape, masked))
    settings = Settings(**({"scale": 0.3, "block_sizes": [BLOCK_SIZE], "blocks_per_row": [1.5]} | FORMS[form]))
    if form.endswith("given-plan"):
        given = given._replace(plan=OPS.select(*for_select(given), *settings))
    return given._replace(seed=torch.tensor([5]) if masked else None), settings._replace(dropout_p=rate(masked))


def opcheck(operator: Any, arguments: tuple[Any, ...], quick: bool) -> None:
    results = torch.library.opcheck(operator.default, arguments, **(QUICK if quick else {}))
    assert set(results.values()) == {"SUCCESS"}


# Every shape, and every layout of one shape.
by_shape_and_layout = pytest.mark.parametrize(
    ("shape", "layout"),
    [(shape, "contiguous") for shape in SHAPES] + [("ragged", layout) for layout in LAYOUTS if layout != "contiguous"],
)


@by_shape_and_layout
@by_mask
@by_form
def test_opcheck(shape, layout, masked, form):
    """Schemas and fake kernels everywhere; below AOT, which is slow, one shape for each form."""
    quick = (shape, layout, masked) != ("ragged", "contiguous", True)
    given, settings = forward_arguments(shape, layout, masked, form)
    opcheck(OPS.forward, (*given, *settings), quick)
    opcheck(OPS.select, (*for_select(given), *settings), quick)
    with torch.no_grad():
        out, lse, chosen = OPS.forward(*given, *settings)
    for grad_lse in (None, torch.randn_like(lse)):
        grads = (lay_out(torch.randn_like(out), layout), grad_lse)
        query, key, value = (x.detach() for x in given[:3])
        constant = given._replace(query=query, key=key, value=value)
        wanted = given.attn_bias is not None
        opcheck(OPS.backward, (*grads, *for_backward(constant, out, lse, chosen), wanted, *settings), quick)
        # With inputs that require gradients, test_aot_dispatch_dynamic would ask for the second derivative.
        opcheck(OPS.backward, (*grads, *for_backward(given, out, lse, chosen), wanted, *settings), quick=True)


STORED = ["BHL", "BLH", "LBH", "LHB", "HBL", "HLB"]


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_results_lie_in_memory_as_the_query(stored, compiled):
    torch.compiler.reset()
    sizes = {"B": 2, "H": 4, "L": 19}

    def make(heads: int, channels: int) -> torch.Tensor:
        tensor = torch.randn(*((sizes | {"H": heads})[name] for name in stored), channels)
        return tensor.permute(*(stored.index(name) for name in "BHL"), 3).requires_grad_()

    query, key, value = make(4, 6), make(2, 6), make(2, 5)
    order = (*("BHL".index(name) for name in stored), 3)

    def attention(*tensors: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(*tensors, enable_gqa=True, **SETTINGS)

    if compiled:
        attention = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    out = attention(query, key, value)
    assert out.permute(order).is_contiguous()
    assert torch.equal(
        out, scaled_dot_product_attention(*(x.contiguous() for x in (query, key, value)), enable_gqa=True, **SETTINGS)
    )
    for tensor, grad in zip((query, key, value), torch.autograd.grad(out.sum(), (query, key, value)), strict=True):
        assert grad.shape == tensor.shape
        assert grad.permute(order).is_contiguous()


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
    given, settings = forward_arguments("blocks", "contiguous", False, "block")
    mask = torch.ones(2, 16, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match="same device"):
        OPS.forward(*given._replace(key_mask=mask), *settings)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("query", torch.randn(2, 2, 16, 3, dtype=torch.float64)),
        ("key", torch.randn(2, 16, 4, dtype=torch.float64)),
        ("key", torch.randn(2, 2, 16, 4)),
        ("value", torch.randn(2, 2, 15, 4, dtype=torch.float64)),
        ("key_mask", torch.ones(2, 15, dtype=torch.bool)),
        ("key_mask", torch.ones(2, 16)),
        ("query_mask", torch.ones(3, 16, dtype=torch.bool)),
        ("attn_bias", torch.ones(2, 2, 16, 15, dtype=torch.bool)),
        ("attn_bias", torch.ones(2, 2, 16, 16, dtype=torch.int64)),
        ("attn_bias", torch.ones(1, 2, 2, 16, 16)),
        ("plan", torch.zeros(2, 15, dtype=torch.uint8)),
        ("plan", torch.zeros(1, 20, dtype=torch.uint8)),
        ("plan", torch.zeros(2, 20)),
        ("cu_seqlens_q", torch.tensor([0, 16])),
        ("scale", float("nan")),
        ("block_sizes", [0]),
        ("block_sizes", [48, 32]),
        ("block_sizes", [129]),
        ("dropout_p", float("nan")),
        ("dropout_p", -0.5),
        ("dropout_p", 1.5),
        ("blocks_per_row", [float("nan")]),
        ("blocks_per_row", [-1.0]),
        ("blocks_per_row", []),
        ("blocks_per_row", [1.0, 2.0, 3.0]),
        ("first_blocks", -1),
        ("local_blocks", 0),
        ("window_left", -2),
    ],
)
@pytest.mark.parametrize("form", ["block", "causal"])
def test_the_operator_survives_wrong_arguments(name, wrong, form):
    """The native module checks again what the public functions have checked."""
    given, settings = forward_arguments("blocks", "contiguous", False, form)
    call = given._asdict() | settings._asdict() | {name: wrong}
    with pytest.raises((ValueError, TypeError, IndexError, RuntimeError, OverflowError)), torch.no_grad():
        OPS.forward(*call.values())


@pytest.mark.parametrize("masked", [False, True])
@by_form
def test_the_size_of_a_plan_is_that_of_the_definition(masked, form):
    """Written down again: a native module that computes another size refuses the plan."""
    for shape, (batch, heads, _, queries, keys, _, _) in SHAPES.items():
        given, settings = forward_arguments(shape, "contiguous", masked, form.removesuffix("-given-plan"))
        rows, columns = math.ceil(queries / BLOCK_SIZE) + 1, math.ceil(keys / BLOCK_SIZE)
        of_blocks = heads * rows * math.ceil(columns / 8)
        places = 0 if form == "window" else max(2, 1 + 1)  # floor(1.5 + 0.5), or the block of the token and the first
        of_tokens = 4 * heads * queries * min(columns, places)
        of_tokens *= masked or not form.startswith("block")
        of_blocks *= form.startswith("block")
        assert OPS.select(*for_select(given), *settings).shape == (batch, 8 + of_blocks + of_tokens)
