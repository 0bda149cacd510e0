"""torch.compile, torch.export and other tracers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from mra_attention import Plan, plan, scaled_dot_product_attention
from ops_cases import BLOCK_SIZE, OPS, SETTINGS, attention, detached, inputs, loss
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function: Any, **settings: Any) -> Any:
    return torch.compile(function, fullgraph=True, **settings)


COMPILED = {
    "plain": lambda q, k, v: scaled_dot_product_attention(q, k, v, **SETTINGS),
    "sparse": lambda q, k, v: scaled_dot_product_attention(q, k, v, mode="sparse", **SETTINGS),
    "lse": lambda q, k, v: scaled_dot_product_attention(q, k, v, return_lse=True, **SETTINGS)[1],
    "plan": lambda q, k, v: scaled_dot_product_attention(
        q, k, v, resolutions=(BLOCK_SIZE, 1), plan=plan(q, k, **SETTINGS)
    ),
    "scale": lambda q, k, v: scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.25, **SETTINGS),
    "three-dimensions": lambda q, k, v: scaled_dot_product_attention(q[0], k[0], v[0], **SETTINGS),
    "heads-inside": lambda q, k, v: (
        scaled_dot_product_attention(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)), **SETTINGS)
        .transpose(1, 2)
        .flatten(2)
    ),
    "masks": lambda q, k, v: scaled_dot_product_attention(
        q,
        k,
        v,
        (k[:, :1, :, 0] > -1.0).unsqueeze(1),
        query_padding_mask=q[:, 0, :, 0] > -1.0,
        **SETTINGS,
    ),
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("backend", "name", "dynamic"),
    [("aot_eager", name, dynamic) for name in COMPILED for dynamic in (False, True)]
    + [("inductor", "plain", False), ("inductor", "plain", True), ("inductor", "heads-inside", False)],
)
def test_compile(backend, name, dynamic):
    if torch.__version__.startswith("2.5.") and backend == "inductor" and dynamic:
        pytest.skip("the Inductor of torch 2.5 cannot print the square root of a dynamic size")
    function = COMPILED[name]
    traced = compiled(function, backend=backend, dynamic=dynamic)
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
def test_compile_with_a_budget_and_a_scale_that_change():
    traced = compiled(
        lambda q, k, v, n, s: scaled_dot_product_attention(q, k, v, resolutions=(BLOCK_SIZE, 1), num_blocks=n, scale=s),
        backend="aot_eager",
    )
    tensors = detached(inputs())
    for number, scale in [(3, 0.5), (4, 0.25), (7, 1.0)]:
        expected = scaled_dot_product_attention(*tensors, resolutions=(BLOCK_SIZE, 1), num_blocks=number, scale=scale)
        assert torch.equal(traced(*tensors, number, scale), expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_takes_and_returns_plans():
    tensors = detached(inputs())
    chosen = plan(*tensors[:2], **SETTINGS)
    returned = compiled(lambda q, k: plan(q, k, **SETTINGS), backend="aot_eager")(*tensors[:2])
    assert isinstance(returned, Plan)
    assert torch.equal(returned.bits, chosen.bits)
    assert (returned.query_length, returned.key_length, returned.block_size) == (19, 27, BLOCK_SIZE)
    density = compiled(lambda q, k: plan(q, k, **SETTINGS).density, backend="aot_eager")(*tensors[:2])
    assert torch.equal(density, chosen.density)
    used = compiled(
        lambda q, k, v, chosen: scaled_dot_product_attention(q, k, v, resolutions=(BLOCK_SIZE, 1), plan=chosen),
        backend="aot_eager",
    )
    assert torch.equal(used(*tensors, chosen), attention(*tensors))


@pytest.mark.skipif(torch.__version__.startswith("2.5."), reason="torch 2.5 traces a forward without context wrongly")
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_of_func_grad():
    tensors = detached(inputs())
    grads = compiled(torch.func.grad(loss, argnums=(0, 1, 2)), backend="aot_eager")(*tensors)
    for grad, want in zip(grads, torch.func.grad(loss, argnums=(0, 1, 2))(*tensors), strict=True):
        assert torch.equal(grad, want)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_under_autocast():
    tensors = detached(inputs(dtype=torch.float32))
    traced = compiled(attention, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = traced(*tensors)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, attention(*tensors))


COMPILED_JVP = """
import torch
from mra_attention import scaled_dot_product_attention

query, key, value = torch.randn(3, 1, 1, 20, 4).unbind()
attention = lambda query: scaled_dot_product_attention(query, key, value)
tangent = torch.compile(lambda query: torch.func.jvp(attention, (query,), (query,)), backend="aot_eager")(query)
"""


def test_compile_of_jvp_raises():
    """In a process of its own: an error inside a compiled torch.func.jvp leaves torch with its level open."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED_JVP], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1
    assert "NotImplementedError: mra_attention has no forward-mode automatic differentiation" in done.stderr


class Attention(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(strict):
    tensors = tuple(detached(inputs()))
    program = torch.export.export(Attention(), tensors, strict=strict)
    assert [node.target for node in program.graph.nodes].count(OPS.forward.default) == 1
    assert torch.equal(program.module()(*tensors), attention(*tensors))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_of_any_length(strict):
    # From nine key blocks on, a row of a plan has more than one byte; torch specializes on sizes of one.
    length = torch.export.Dim("length", min=9 * BLOCK_SIZE, max=4096)
    tensors = tuple(torch.randn(1, 2, 100, 4) for _ in range(3))
    shapes = ({2: length}, {2: length}, {2: length})
    program = torch.export.export(Attention(), tensors, dynamic_shapes=shapes, strict=strict)
    for other in (72, 101, 333):
        tensors = tuple(torch.randn(1, 2, other, 4) for _ in range(3))
        assert torch.equal(program.module()(*tensors), attention(*tensors))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("recorded", [False, True], ids=["no-grad", "grad"])
def test_jit_trace_records_the_operator(recorded):
    tensors = inputs() if recorded else detached(inputs())
    traced = torch.jit.trace(Attention(), tuple(tensors), check_trace=False)
    assert [node.kind() for node in traced.graph.nodes()].count("mra_attention::forward") == 1
    others = detached(inputs())
    assert torch.equal(traced(*others), attention(*others))


def test_fake_tensors_pass():

    with FakeTensorMode():
        query, key, value = torch.empty(2, 4, 40, 16), torch.empty(2, 2, 48, 16), torch.empty(2, 2, 48, 8)
        out, lse = scaled_dot_product_attention(query, key, value, enable_gqa=True, return_lse=True)
        chosen = plan(query, key, enable_gqa=True)
    assert (out.shape, out.dtype, out.device.type) == ((2, 4, 40, 8), torch.float32, "cpu")
    assert (lse.shape, lse.dtype) == ((2, 4, 40), torch.float32)
    assert (chosen.bits.shape, chosen.bits.dtype) == ((2, 4, 2, 1), torch.uint8)
