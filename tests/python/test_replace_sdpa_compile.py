"""`replace_sdpa` and torch.compile, each outside of the other, and exported programs."""

from __future__ import annotations

import mra_attention
import pytest
import torch
import torch.nn.functional as F
from models import HEADS, WIDTH, encoder, tokens, vision_model
from mra_attention import FallbackWarning, replace_sdpa
from torch import Tensor

# The runner of compiled graphs asks a mode for every operator; the backend makes no difference to what is traced.
BACKEND = "aot_eager"


def few(blocks_per_row: int = 1) -> replace_sdpa:
    return replace_sdpa(resolutions=(8, 1), blocks_per_row=blocks_per_row, min_length=20)


def qkv(length: int = 60) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, HEADS, length, 8, generator=generator) for _ in range(3)]


def attend(*inputs: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*inputs)


def direct(*inputs: Tensor, blocks_per_row: int = 1) -> Tensor:
    return mra_attention.scaled_dot_product_attention(*inputs, resolutions=(8, 1), blocks_per_row=blocks_per_row)


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, backend=BACKEND, fullgraph=True, **options)


def test_a_compiled_function_inside_and_outside():
    """It is compiled again for another config, and where there is none."""
    function, inputs = compiled(attend), qkv()
    assert torch.equal(function(*inputs), attend(*inputs))
    for blocks_per_row in (1, 2):
        with few(blocks_per_row) as replaced:
            assert torch.equal(function(*inputs), direct(*inputs, blocks_per_row=blocks_per_row))
            (row,) = report = tuple(replaced.report())
            assert (row.layer, row.query_shape, row.taken) == ("(compiled)", (), True)
            function(*inputs)
            assert tuple(replaced.report()) == report, "counted when traced, not when run"
    assert torch.equal(function(*inputs), attend(*inputs))


def test_dynamic_lengths():
    function = compiled(attend, dynamic=True)
    with few() as replaced:
        for length in (60, 70, 16):
            inputs = qkv(length)
            assert torch.equal(function(*inputs), direct(*inputs) if length >= 20 else attend(*inputs)), length
    assert [row.reason for row in replaced.report() if row.layer == "(compiled)"] == [
        None,
        "fewer keys than min_length=20",
    ]


def test_a_context_inside_of_a_compiled_function():
    replaced, inputs = few(), qkv()

    def inside(*inputs: Tensor) -> Tensor:
        with replaced:
            return attend(*inputs)

    for function in (inside, replaced(attend)):
        assert torch.equal(compiled(function)(*inputs), direct(*inputs))
        assert torch.equal(attend(*inputs), compiled(attend)(*inputs))

    def made_inside(*inputs: Tensor) -> Tensor:
        with few():
            return attend(*inputs)

    with pytest.warns(UserWarning, match="Dynamo does not know how to trace"):
        assert torch.equal(torch.compile(made_inside, backend=BACKEND)(*inputs), direct(*inputs))


def test_what_is_not_supported_goes_to_torch():
    inputs = [x.to("meta") for x in qkv()]
    with few() as replaced, pytest.warns(FallbackWarning, match=r"\(compiled\): .* device meta"):
        compiled(attend)(*inputs)
    assert replaced.report().taken == 0


def test_a_model_with_gradients():
    model, x = vision_model(), tokens()
    with few():
        expected = model(x)
        out = compiled(model)(x)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
        weight = model[0].qkv.weight
        ours, theirs = (torch.autograd.grad(y.square().sum(), weight)[0] for y in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_multi_head_attention():
    attention = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    x, function = tokens(), compiled(attention)
    with few() as replaced:
        assert torch.equal(function(x, x, x, need_weights=False)[0], attention(x, x, x, need_weights=False)[0])
        with pytest.warns(FallbackWarning, match="need_weights"):
            function(x, x, x)
    assert replaced.report().taken == 2


@torch.no_grad()
def test_the_fused_layers_of_compiled_models():
    model, x = encoder(), tokens()
    expected = model(x)
    with few() as replaced, pytest.warns(FallbackWarning, match="mra_attention.nn.convert"):
        torch.testing.assert_close(compiled(model)(x), expected)
    (row,) = replaced.report()
    assert (row.function, row.query_shape, row.calls) == ("_transformer_encoder_layer_fwd", tuple(x.shape), 2)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with few() as replaced:
            assert torch.equal(compiled(model)(x), model(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert replaced.report().not_taken == 0


def test_exported_programs():
    inputs = tuple(qkv())

    class Attend(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return attend(*inputs)

    program = torch.export.export(Attend(), inputs).module()
    with few() as replaced:
        assert torch.equal(program(*inputs), direct(*inputs))
    assert replaced.report().taken == 1
