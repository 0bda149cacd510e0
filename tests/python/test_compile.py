"""torch.compile, torch.export and other tracers."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from mra_attention import MRAConfig, Plan, plan, scaled_dot_product_attention
from ops_cases import BLOCK_SIZE, OPS, SETTINGS, attention, detached, inputs, loss
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function: Any, **settings: Any) -> Any:
    return torch.compile(function, fullgraph=True, **settings)


CONFIG = MRAConfig(resolutions=(BLOCK_SIZE, 1), blocks_per_row=2)
COMPILED = {
    "plain": lambda q, k, v: scaled_dot_product_attention(q, k, v, **SETTINGS),
    "sparse": lambda q, k, v: scaled_dot_product_attention(q, k, v, mode="sparse", **SETTINGS),
    "lse": lambda q, k, v: scaled_dot_product_attention(q, k, v, return_lse=True, **SETTINGS)[1],
    "plan": lambda q, k, v: scaled_dot_product_attention(
        q, k, v, resolutions=(BLOCK_SIZE, 1), plan=plan(q, k, **SETTINGS)
    ),
    "config": lambda q, k, v: scaled_dot_product_attention(q, k, v, config=CONFIG, mode="sparse"),
    "per head": lambda q, k, v: scaled_dot_product_attention(
        q, k, v, **(SETTINGS | {"blocks_per_row": (1, 2.5)[: q.shape[1]]})
    ),
    "causal": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, **SETTINGS),
    "causal-sparse": lambda q, k, v: scaled_dot_product_attention(
        q, k, v, is_causal=True, mode="sparse", local_blocks=2, first_blocks=0, **SETTINGS
    ),
    "causal-plan": lambda q, k, v: scaled_dot_product_attention(
        q, k, v, is_causal=True, resolutions=(BLOCK_SIZE, 1), plan=plan(q, k, is_causal=True, **SETTINGS)
    ),
    "window": lambda q, k, v: scaled_dot_product_attention(q, k, v, window_size=(9, 4), **SETTINGS),
    "window-mask": lambda q, k, v: scaled_dot_product_attention(
        q, k, v, k[:, :, None, :, 0] > -1.0, is_causal=True, window_size=(9, -1), **SETTINGS
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
    + [("inductor", "plain", False), ("inductor", "plain", True), ("inductor", "heads-inside", False)]
    + [("inductor", "causal", True)],
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
@pytest.mark.parametrize("is_causal", [False, True])
def test_compile_with_rates_and_windows_that_change(is_causal):
    def attention(q: Tensor, k: Tensor, v: Tensor, rate: float, left: int) -> Tensor:
        return scaled_dot_product_attention(
            q, k, v, resolutions=(BLOCK_SIZE, 1), is_causal=is_causal, blocks_per_row=rate, window_size=(left, -1)
        )

    traced, tensors = compiled(attention, backend="aot_eager"), detached(inputs())
    for rate, left in [(1.5, -1), (2.5, 5), (1.0, 9), (math.inf, 0)]:
        assert torch.equal(traced(*tensors, rate, left), attention(*tensors, rate, left))


def compilations(attention: Any) -> int:
    """How often a function is compiled for eight lengths, on both sides of what might be taken for special."""
    torch.compiler.reset()
    counter = CompileCounter()
    traced = torch.compile(attention, backend=counter, dynamic=True)
    for length in (100, 37, 32, 33, 257, 300, 2, 1):
        traced(*(torch.randn(1, 2, length, 4) for _ in range(3)))
    return counter.frame_count


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "form", [{}, {"is_causal": True}, {"window_size": (5, 7)}, {"is_causal": True, "mode": "sparse"}]
)
def test_no_more_compilations_than_torch_attention(form):
    allowed = compilations(torch.nn.functional.scaled_dot_product_attention)
    assert compilations(lambda q, k, v: scaled_dot_product_attention(q, k, v, **form)) <= allowed
    config = MRAConfig(blocks_per_row=2)
    assert compilations(lambda q, k, v: scaled_dot_product_attention(q, k, v, config=config, **form)) <= allowed


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_takes_and_returns_plans():
    tensors = detached(inputs())
    chosen = plan(*tensors[:2], **SETTINGS)
    returned = compiled(lambda q, k: plan(q, k, **SETTINGS), backend="aot_eager")(*tensors[:2])
    assert isinstance(returned, Plan)
    assert torch.equal(returned.data, chosen.data)
    assert (returned.query_shape, returned.key_shape) == ((1, 2, 19, 4), (1, 2, 27, 4))
    assert returned.config == chosen.config
    assert torch.equal(returned.block_mask(), chosen.block_mask())
    # What a plan says of itself depends on its values, so a graph is split there.
    density = torch.compile(lambda q, k: plan(q, k, **SETTINGS).density, backend="aot_eager")(*tensors[:2])
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
    def __init__(self, **form: Any) -> None:
        super().__init__()
        self.form = form

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, **(SETTINGS | self.form))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(strict):
    tensors = tuple(detached(inputs()))
    program = torch.export.export(Attention(), tensors, strict=strict)
    assert [node.target for node in program.graph.nodes].count(OPS.forward.default) == 1
    assert torch.equal(program.module()(*tensors), attention(*tensors))


ANY_LENGTH = {
    "1 to 4096": lambda: torch.export.Dim("length", min=1, max=4096),
    "2 to 4096": lambda: torch.export.Dim("length", min=2, max=4096),
    "AUTO": lambda: torch.export.Dim.AUTO,
}


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("length", ANY_LENGTH)
@pytest.mark.parametrize("form", [{}, {"is_causal": True}, {"window_size": (5, 7)}, {"pool_queries": False}], ids=str)
def test_export_of_any_length(form, length, strict):
    if torch.__version__.startswith("2.5.") and length == "AUTO":
        pytest.skip("torch 2.5 has no Dim.AUTO")
    module, dim = Attention(**form), ANY_LENGTH[length]()
    tensors = tuple(torch.randn(1, 2, 100, 4) for _ in range(3))
    program = torch.export.export(module, tensors, dynamic_shapes=({2: dim},) * 3, strict=strict)
    assert [node.target for node in program.graph.nodes].count(OPS.forward.default) == 1
    for other in (1, 2, 8, 9, 31, 64, 65, 101, 333):
        tensors = tuple(torch.randn(1, 2, other, 4) for _ in range(3))
        assert torch.equal(program.module()(*tensors), module(*tensors)), other


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("pairs", [False, True], ids=["keys", "pairs"])
def test_export_of_any_length_with_a_mask(pairs, strict):
    class Masked(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
            return scaled_dot_product_attention(query, key, value, mask, **SETTINGS)

    def arguments(length: int) -> tuple[Tensor, ...]:
        mask = torch.rand(1, 1, length if pairs else 1, length) > 0.2
        return *(torch.randn(1, 2, length, 4) for _ in range(3)), mask

    length = torch.export.Dim("length", min=1, max=4096)
    shapes = ({2: length},) * 3 + (({2: length, 3: length} if pairs else {3: length}),)
    program = torch.export.export(Masked(), arguments(100), dynamic_shapes=shapes, strict=strict)
    for other in (2, 9, 64, 101):
        given = arguments(other)
        assert torch.equal(program.module()(*given), Masked()(*given)), other


def test_torch_script_refuses_the_function():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, says torch
        with pytest.raises(torch.jit.frontend.NotSupportedError, match="variable number of arguments"):
            torch.jit.script(scaled_dot_product_attention)


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
    assert (chosen.data.shape, chosen.data.dtype) == ((2, 8 + 4 * 3 * 1), torch.uint8)
