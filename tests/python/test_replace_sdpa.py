"""`replace_sdpa`: which calls are taken, what becomes of the others, and what the report says."""

from __future__ import annotations

import itertools
import linecache
import warnings

import mra_attention
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, named
from models import (
    ENCODER_MASKS,
    EXACT,
    FEW,
    FEW_SETTINGS,
    HEADS,
    LENGTH,
    WIDTH,
    causal,
    encoder,
    few,
    qkv,
    tokens,
    transformer,
    valid,
    vision_model,
)
from mra_attention import FallbackWarning, MRAConfig, replace_sdpa
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


def gradients(model: torch.nn.Module, out: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out.square().sum(), list(model.parameters())))


def assert_same_model(model: torch.nn.Module, *inputs: Tensor, kept=lambda out: out, **keywords) -> None:
    """With every block exact, outputs and gradients inside are torch's; with few blocks they are others."""
    expected = kept(model(*inputs, **keywords))
    expected_gradients = gradients(model, expected)
    with replace_sdpa(**EXACT) as replaced:
        out = kept(model(*inputs, **keywords))
        assert_close(out, expected, "out")
        for (name, _), a, e in zip(model.named_parameters(), gradients(model, out), expected_gradients, strict=True):
            assert_close(a, e, name)
    assert replaced.report().taken > 0
    assert replaced.report().not_taken == 0
    with replace_sdpa(**FEW):
        assert not torch.allclose(kept(model(*inputs, **keywords)), expected)


def test_a_call_is_the_direct_call():
    query, key, value = qkv()
    mask = torch.rand(300, 300, generator=torch.Generator().manual_seed(4)) < 0.9
    bias = torch.randn(1, HEADS, 300, 300, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    cases = [{}, {"attn_mask": mask}, {"attn_mask": bias}, {"is_causal": True}, {"scale": 0.1}]
    cases += [{"attn_mask": causal_lower_right(300, 300)}, {"dropout_p": 0.3}]
    for case in cases:
        with named(case), replace_sdpa(**FEW) as replaced:
            torch.manual_seed(0)
            out = F.scaled_dot_product_attention(query, key, value, **case)
            torch.manual_seed(0)
            assert torch.equal(out, few(query, key, value, **case))
            assert [row.taken for row in replaced.report()] == [True]
    with replace_sdpa(**FEW):
        out = F.scaled_dot_product_attention(query, key[:, :1], value[:, :1], None, 0.0, False, enable_gqa=True)
        assert torch.equal(out, few(query, key[:, :1], value[:, :1], enable_gqa=True))
        assert torch.equal(F.scaled_dot_product_attention(key=key, value=value, query=query), few(query, key, value))


def test_a_config_and_settings():
    query, key, value = qkv()
    config = MRAConfig(resolutions=(8, 1), blocks_per_row=[1, 3])
    with replace_sdpa(config, mode="sparse"):
        out = F.scaled_dot_product_attention(query, key, value)
    assert torch.equal(out, mra_attention.scaled_dot_product_attention(query, key, value, config=config, mode="sparse"))


def test_vmap_func_and_jagged_tensors():
    query, key, value = qkv(batch=3)
    with replace_sdpa(**FEW) as replaced:
        out = torch.vmap(F.scaled_dot_product_attention)(query, key, value)
        assert torch.equal(out, torch.vmap(few)(query, key, value))
        gradient = torch.func.grad(lambda x: F.scaled_dot_product_attention(x, key, value).sum())(query)
        assert torch.equal(gradient, torch.func.grad(lambda x: few(x, key, value).sum())(query))
        sequences = [torch.randn(n, HEADS, 8, dtype=torch.float64) for n in (50, 200)]
        jagged = torch.nested.nested_tensor(sequences, layout=torch.jagged).transpose(1, 2)
        out = F.scaled_dot_product_attention(jagged, jagged, jagged)
        assert torch.equal(out.values(), few(jagged, jagged, jagged).values())
    assert replaced.report().not_taken == 0


def test_a_vision_model():
    assert_same_model(vision_model(), tokens())


@pytest.mark.parametrize("masks", ENCODER_MASKS)
def test_an_encoder(masks):
    keywords = ENCODER_MASKS[masks]
    assert_same_model(encoder(), tokens(), kept=lambda out: valid(out, keywords), **keywords)


@pytest.mark.parametrize("masks", ["nothing", "padding", "pairs"])
@torch.no_grad()
def test_fused_inference_is_off(masks):
    """Without gradients, torch computes a layer at once, from nested tensors where there is padding."""
    keywords, model = ENCODER_MASKS[masks], encoder()
    with replace_sdpa(**FEW) as replaced:
        out = model(tokens(), **keywords)
    assert [(row.layer, row.calls) for row in replaced.report()] == [
        ("layers.0.self_attn", 1),
        ("layers.1.self_attn", 1),
    ]
    assert not torch.allclose(valid(out, keywords), valid(model(tokens(), **keywords), keywords))
    with replace_sdpa(**EXACT):
        assert_close(valid(model(tokens(), **keywords), keywords), valid(model(tokens(), **keywords), keywords), "out")


def test_a_decoder_with_cross_attention():
    target, source = tokens(LENGTH - 30), tokens()
    model = transformer()
    assert_same_model(model, source, target, tgt_mask=causal(LENGTH - 30), tgt_is_causal=True)
    with replace_sdpa(**EXACT) as replaced:
        model(source, target)
    layers = {row.layer: (row.query_shape[0], row.key_shape[0]) for row in replaced.report()}
    assert layers == {
        "encoder.layers.0.self_attn": (LENGTH, LENGTH),
        "decoder.layers.0.self_attn": (LENGTH - 30, LENGTH - 30),
        "decoder.layers.0.multihead_attn": (LENGTH - 30, LENGTH),
    }


class Wrapped(Tensor):
    """A subclass that could have attention of its own."""


def test_what_is_not_supported_goes_to_torch():
    query, key, value = qkv()
    attention = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    x = tokens()
    strided = torch.nested.nested_tensor(list(query[:, 0]), layout=torch.strided).unsqueeze(1)
    cases = {
        "device meta": lambda: F.scaled_dot_product_attention(query.to("meta"), key.to("meta"), value.to("meta")).shape,
        "one for each of the 1 heads": lambda: F.scaled_dot_product_attention(query[:, :1], key[:, :1], value[:, :1]),
        "Wrapped is a subclass": lambda: F.scaled_dot_product_attention(query.as_subclass(Wrapped), key, value),
        "layout torch.strided": lambda: F.scaled_dot_product_attention(strided, strided, strided).unbind(),
        "need_weights": lambda: attention(x, x, x),
        "static_k": lambda: F.multi_head_attention_forward(
            *[x.transpose(0, 1)] * 3,
            *(WIDTH, HEADS, attention.in_proj_weight, attention.in_proj_bias, None, None, False, 0.0),
            *(attention.out_proj.weight, attention.out_proj.bias),
            need_weights=False,
            static_k=torch.ones(2 * HEADS, LENGTH, WIDTH // HEADS, dtype=torch.float64),
        )[0],
    }
    for reason, call in cases.items():
        expected = call()
        with named(reason), replace_sdpa(blocks_per_row=[1, 2], min_length=10) as replaced:
            with pytest.warns(FallbackWarning, match=reason) as warned:
                out = call()
            line = linecache.getline(warned[0].filename, warned[0].lineno)
            assert "lambda" in line, "the call of torch's function, in the table above"
            call()  # a second warning would be an error
            for a, e in zip(out, expected, strict=True) if isinstance(out, tuple) else [(out, expected)]:
                assert torch.equal(a, e) if isinstance(a, Tensor) else a == e
            (row,) = replaced.report()
            assert reason in (row.reason or "")
            assert (row.calls, row.taken) == (2, False)


def test_what_only_the_run_shows_goes_to_torch():
    """Dropout below vmap is refused when its operator runs."""
    query, key, value = qkv(batch=2)

    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, key[0], value[0], dropout_p=0.5)

    with replace_sdpa(**FEW), pytest.warns(FallbackWarning, match="dropout"):
        out = torch.vmap(attend, randomness="different")(query)
    assert out.shape == query.shape


def test_each_layer_warns_once():
    model = torch.nn.ModuleList(torch.nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64) for _ in range(2))
    both = torch.nn.Module()
    both.layers = model
    both.forward = lambda x: [layer(x, x, x) for layer in model]
    with replace_sdpa(**FEW), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        both(tokens())
        both(tokens())
    assert [str(w.message).split(":")[0] for w in warned] == ["layers.0", "layers.1"]


def test_layers_are_named_in_the_outermost_module():
    model = vision_model()
    with replace_sdpa(**FEW) as replaced:
        model[0](tokens())
        model(tokens())
        model[2](tokens())
    assert [(row.layer, row.calls) for row in replaced.report()] == [("VisionAttention", 2), ("0", 1), ("2", 1)]


def test_errors_are_torchs():
    query, key, value = qkv()
    wrong = [(query, key[..., :4], value), (query, key[0, 0, 0], value), (query, key.float(), value)]
    with replace_sdpa(min_length=0), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        weights = (torch.ones(3 * WIDTH, WIDTH).double(), None, None, None, False, 0.0, torch.ones(WIDTH, WIDTH), None)
        with pytest.raises(AssertionError, match="embed_dim 16 not divisible by num_heads 3"):
            F.multi_head_attention_forward(*[tokens()] * 3, WIDTH, 3, *weights, need_weights=False)
        for tensors in wrong:
            with pytest.raises((RuntimeError, ValueError, IndexError)) as inside:
                F.scaled_dot_product_attention(*tensors)
            with torch._C.DisableTorchFunction(), pytest.raises(inside.type) as outside:
                F.scaled_dot_product_attention(*tensors)
            assert str(inside.value) == str(outside.value)


def test_min_length():
    query, key, value = qkv(300)
    with replace_sdpa(min_length=100, **FEW_SETTINGS) as replaced:
        for queries, keys in itertools.product((50, 100, 300), (99, 100)):
            inputs = (query[:, :, :queries], key[:, :, :keys], value[:, :, :keys])
            if keys < 100:
                expected = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*inputs)[0]
            else:
                expected = few(*inputs, pool_queries=queries == keys)
            assert torch.equal(F.scaled_dot_product_attention(*inputs), expected), (queries, keys)
    short, long = replaced.report()
    assert short.reason == "fewer keys than min_length=100"
    assert short.calls == long.calls == 3
    assert (short.query_shape, short.key_shape) == ((1, HEADS, "50..300", 8), (1, HEADS, 99, 8))
    sequences = [torch.randn(n, HEADS, 8, dtype=torch.float64) for n in (98, 101)]
    jagged = torch.nested.nested_tensor(sequences, layout=torch.jagged).transpose(1, 2)
    for least, taken in ((99, True), (100, False)):
        with replace_sdpa(min_length=least) as replaced:
            F.scaled_dot_product_attention(jagged, jagged, jagged)
        (row,) = replaced.report()
        assert (row.taken, row.key_shape) == (taken, (2, HEADS, "j", 8))


def test_wrong_arguments():
    for arguments, error in (
        ({"min_length": -1}, ValueError),
        ({"min_length": 1.5}, TypeError),
        ({"config": 4}, TypeError),
        ({"blocks": 4}, TypeError),
        ({"mode": "dense"}, ValueError),
    ):
        with pytest.raises(error, match=next(iter(arguments))):
            replace_sdpa(**arguments)


def test_the_report_is_a_table():
    replaced = replace_sdpa(min_length=20)
    assert str(replaced.report()).endswith("0 calls taken, 0 not")
    with replaced:
        encoder()(tokens())
        F.scaled_dot_product_attention(*qkv(10))
    report = replaced.report()
    assert (len(report), report.taken, report.not_taken) == (3, 2, 1)
    assert str(report).splitlines() == [
        "layer               function                      query          key            calls  taken",
        "layers.0.self_attn  multi_head_attention_forward  (90, 2, 16)    (90, 2, 16)    1      yes",
        "layers.1.self_attn  multi_head_attention_forward  (90, 2, 16)    (90, 2, 16)    1      yes",
        "(no module)         scaled_dot_product_attention  (1, 2, 10, 8)  (1, 2, 10, 8)  1      no: fewer keys than "
        "min_length=20",
        "2 calls taken, 1 not",
    ]


BACKWARDS = {
    "Tensor.backward": lambda loss, x: loss.backward(),
    "autograd.backward": lambda loss, x: torch.autograd.backward([loss]),
    "autograd.grad": lambda loss, x: x.__setattr__("grad", torch.autograd.grad(loss, x)[0]),
}


@pytest.mark.parametrize(
    ("backward", "use_reentrant"),
    # torch refuses the one that is left
    [*((name, False) for name in BACKWARDS), ("Tensor.backward", True), ("autograd.backward", True)],
)
def test_checkpointed_layers(backward, use_reentrant):
    model = vision_model()
    results = []
    for layer in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        x = tokens().requires_grad_()
        with replace_sdpa(**EXACT), replace_sdpa(**FEW) as replaced:
            BACKWARDS[backward](layer(x).square().sum(), x)
        assert replaced.report().not_taken == 0
        results.append(x.grad)
    assert torch.equal(*results)
