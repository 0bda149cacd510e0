"""`mra_attention.nn`: torch's MultiheadAttention with our attention, and the conversion of models."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from typing import Any

import mra_attention
import pytest
import torch
from helpers import assert_close, named
from models import (
    ENCODER_MASKS,
    HEADS,
    LENGTH,
    WIDTH,
    as_bias,
    causal,
    encoder,
    padding,
    tokens,
    transformer,
    valid,
    vision_model,
)
from mra_attention import MRAConfig
from mra_attention.nn import MultiheadAttention, convert
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")

EXACT = MRAConfig(blocks_per_row=math.inf)
FEW = MRAConfig(resolutions=(8, 1), blocks_per_row=1)


def pair(**options: Any) -> tuple[torch.nn.MultiheadAttention, MultiheadAttention]:
    """torch's module and ours with the same weights, all of them random."""
    torch.manual_seed(0)
    options = {"dtype": torch.float64} | options
    theirs = torch.nn.MultiheadAttention(WIDTH, HEADS, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours = MultiheadAttention(WIDTH, HEADS, **options, config=EXACT)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def assert_same(theirs, ours, *inputs: Tensor, kept=lambda out: out, **keywords) -> None:
    """Outputs and all gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    expected, _ = theirs(*leaves, **keywords, need_weights=False)
    out, weights = ours(*leaves, **keywords)
    assert weights is None
    assert_close(kept(out), kept(expected), "out")
    grad_out = torch.randn(kept(expected).shape, dtype=torch.float64)
    names = [*"qkv", *(name for name, _ in theirs.named_parameters())]
    assert names[3:] == [name for name, _ in ours.named_parameters()]
    expected_gradients = torch.autograd.grad(kept(expected), [*leaves, *theirs.parameters()], grad_out)
    gradients = torch.autograd.grad(kept(out), [*leaves, *ours.parameters()], grad_out)
    for name, a, e in zip(names, gradients, expected_gradients, strict=True):
        assert_close(a, e, name)


MASKS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "padding": {"key_padding_mask": padding()},
    "padding as a bias": {"key_padding_mask": as_bias(padding())},
    "causal hint": {"attn_mask": causal(), "is_causal": True},
    "causal mask": {"attn_mask": causal()},
    "causal hint, padding": {"attn_mask": as_bias(causal()), "is_causal": True, "key_padding_mask": as_bias(padding())},
    "causal mask, padding": {"attn_mask": causal(), "key_padding_mask": padding()},
    "bias": {"attn_mask": torch.randn(LENGTH, LENGTH, dtype=torch.float64)},
    "bias of heads": {"attn_mask": torch.randn(2 * HEADS, LENGTH, LENGTH, dtype=torch.float64)},
    "mask of heads, padding": {
        "attn_mask": torch.rand(2 * HEADS, LENGTH, LENGTH) < 0.3,
        "key_padding_mask": padding(),
    },
    "bias of heads, padding": {
        "attn_mask": torch.randn(2 * HEADS, LENGTH, LENGTH, dtype=torch.float64),
        "key_padding_mask": as_bias(padding()),
    },
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no bias": {"bias": False},
    "kdim, vdim": {"kdim": 12, "vdim": 20},
    "kdim, vdim, no bias": {"kdim": 12, "vdim": 20, "bias": False},
    "added keys": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("options", OPTIONS)
def test_is_torchs_with_every_block(options, masks):
    for batch_first in (True, False):
        with named(batch_first):
            theirs, ours = pair(**OPTIONS[options], batch_first=batch_first)
            inputs = [torch.randn(2, LENGTH, n, dtype=torch.float64) for n in (WIDTH, theirs.kdim, theirs.vdim)]
            if not batch_first:
                inputs = [x.transpose(0, 1) for x in inputs]
            # torch leaves open what padded queries get
            hidden = padding() if "key_padding_mask" in MASKS[masks] else torch.zeros(2, LENGTH, dtype=torch.bool)
            kept = ~(hidden if batch_first else hidden.t())
            assert_same(theirs, ours, *inputs, kept=lambda out, kept=kept: out[kept], **MASKS[masks])


def test_self_attention_cross_attention_and_no_batch():
    for batch_first in (True, False):
        theirs, ours = pair(batch_first=batch_first)
        x, y = (torch.randn(3, n, WIDTH, dtype=torch.float64) for n in (70, LENGTH))
        if not batch_first:
            x, y = x.transpose(0, 1), y.transpose(0, 1)
        for inputs in ((x, x, x), (x, y, y), (y, x, x.clone())):
            with torch.no_grad():
                assert_close(ours(*inputs)[0], theirs(*inputs, need_weights=False)[0], "out")
        assert_same(theirs, ours, x, y, y)
        alone = tokens()[1]
        masks = {"key_padding_mask": padding()[1], "attn_mask": causal()}
        assert_same(theirs, ours, alone, alone, alone, kept=lambda out: out[~padding()[1]], **masks)


def test_is_causal_needs_no_mask():
    theirs, ours = pair(batch_first=True)
    x = tokens()
    expected = theirs(x, x, x, attn_mask=causal(), need_weights=False)[0]
    assert_close(ours(x, x, x, is_causal=True)[0], expected, "out")
    _, ours = pair(batch_first=True, add_zero_attn=True)
    with pytest.raises(ValueError, match="pass attn_mask, too"):
        ours(x, x, x, is_causal=True, key_padding_mask=padding())


def test_no_mask_of_pairs_is_made(monkeypatch):
    """Padding and causality reach attention as they are."""
    calls = []

    def attention(query, key, value, attn_mask, dropout_p, is_causal, query_padding_mask, config):
        calls.append((None if attn_mask is None else tuple(attn_mask.shape), is_causal))
        return query

    monkeypatch.setattr("mra_attention.nn.multi_head.scaled_dot_product_attention", attention)
    _, ours = pair(batch_first=True)
    x = tokens()
    ours(x, x, x, key_padding_mask=padding(), attn_mask=causal(), is_causal=True)
    ours(x, x, x, key_padding_mask=as_bias(padding()))
    ours(x, x, x, attn_mask=causal(), is_causal=True)
    assert calls == [((2, 1, 1, LENGTH), True), ((2, 1, 1, LENGTH), False), (None, True)]


def test_padded_keys_are_padded_queries_in_self_attention_only():
    theirs, ours = pair(batch_first=True)
    ours.config, x, source, mask = FEW, tokens(), tokens() + 1, padding()
    weights, biases = ours.in_proj_weight.chunk(3), ours.in_proj_bias.chunk(3)
    for key, queries in ((x, None), (source, torch.ones_like(mask))):
        heads = [
            torch.nn.functional.linear(*each).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for each in zip((x, key, key), weights, biases, strict=True)
        ]
        out = mra_attention.scaled_dot_product_attention(
            *heads,
            attn_mask=~mask[:, None, None, :],
            query_padding_mask=queries,
            config=FEW,
            pool_queries=key is x,
        )
        expected = ours.out_proj(out.transpose(1, 2).flatten(-2))
        assert_close(ours(x, key, key, key_padding_mask=mask)[0], expected, "module")
        with mra_attention.replace_sdpa(FEW, min_length=0):
            assert_close(theirs(x, key, key, key_padding_mask=mask, need_weights=False)[0], expected, "replaced")


def test_few_blocks_are_the_direct_call():
    theirs, ours = pair(batch_first=True, dropout=0.2)
    ours.config = config = MRAConfig(resolutions=(8, 1), blocks_per_row=[1, 3], mode="sparse")
    x = tokens()
    for training, p in ((True, 0.2), (False, 0.0)):
        ours.train(training)
        projected = torch.nn.functional.linear(x, ours.in_proj_weight, ours.in_proj_bias).chunk(3, -1)
        heads = [y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in projected]
        torch.manual_seed(1)
        out = mra_attention.scaled_dot_product_attention(*heads, dropout_p=p, config=config)
        expected = torch.nn.functional.linear(out.transpose(1, 2).flatten(-2), ours.out_proj.weight, ours.out_proj.bias)
        torch.manual_seed(1)
        assert torch.equal(ours(x, x, x)[0], expected)
    assert not torch.allclose(expected, theirs(x, x, x)[0])


def test_autocast_and_low_precision():
    theirs, ours = pair(batch_first=True, dtype=torch.float32)
    x = tokens().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x, x, x)[0].dtype == theirs(x, x, x, need_weights=False)[0].dtype == torch.bfloat16
    assert ours.bfloat16()(*[x.bfloat16()] * 3)[0].dtype == torch.bfloat16


def test_signatures_are_torchs():
    for ours, theirs, differs in (
        (MultiheadAttention.__init__, torch.nn.MultiheadAttention.__init__, {}),
        (MultiheadAttention.forward, torch.nn.MultiheadAttention.forward, {"need_weights": (False, True)}),
        (
            mra_attention.nn.multi_head.multi_head_attention_forward,
            torch.nn.functional.multi_head_attention_forward,
            {},
        ),
    ):
        parameters = inspect.signature(ours).parameters
        for name, parameter in inspect.signature(theirs).parameters.items():
            expected = differs.get(name, (parameter.default, parameter.default))
            assert (parameters[name].default, parameter.default) == expected, name
        positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == list(inspect.signature(theirs).parameters)


def test_refusals():
    _, ours = pair(batch_first=True)
    x = tokens()
    for keywords, error, message in (
        ({"need_weights": True}, ValueError, "pass need_weights=False"),
        ({"key": x[:, 1:]}, ValueError, "key and value must have the same length"),
        ({"query": x[..., 1:]}, ValueError, "embed_dim, 16"),
        ({"query": x[0]}, ValueError, "two dimensions, or three"),
        ({"query": x[:1]}, ValueError, "query and key must have the same batch, dimension 0"),
        ({"key_padding_mask": padding()[:, 1:]}, ValueError, r"key_padding_mask must have the shape \(2, 90\)"),
        ({"attn_mask": causal()[1:]}, ValueError, r"attn_mask must have the shape \(90, 90\) or \(4, 90, 90\)"),
        ({"attn_mask": causal().int()}, TypeError, "attn_mask must be a bool tensor"),
        ({"value": x.to("meta")}, NotImplementedError, "value is on device meta"),
        ({"query": torch.nested.nested_tensor(list(x), layout=torch.jagged)}, NotImplementedError, "nested"),
    ):
        with pytest.raises(error, match=message):
            ours(**({"query": x, "key": x, "value": x} | keywords))
    for keywords in ({"blocks_per_row": [1, 2, 3]}, {"config": 3}, {"mode": "dense"}, {"blocks": 1}):
        with pytest.raises((TypeError, ValueError), match=next(iter(keywords))):
            MultiheadAttention(WIDTH, HEADS, **keywords)


def test_initial_weights_are_torchs():
    for options in OPTIONS.values():
        torch.manual_seed(0)
        expected = torch.nn.MultiheadAttention(WIDTH, HEADS, **options).state_dict()
        torch.manual_seed(0)
        ours = MultiheadAttention(WIDTH, HEADS, **options)
        assert expected.keys() == ours.state_dict().keys()
        assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    theirs, ours = pair()
    for module in (theirs, ours):
        torch.manual_seed(0)
        module._reset_parameters()
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("masks", ENCODER_MASKS)
def test_a_converted_encoder(masks):
    """With and without gradients: torch's fused path reads the weights of the module that it calls otherwise."""
    keywords, x = ENCODER_MASKS[masks], tokens()
    model = encoder()
    expected = model(x, **keywords)
    with torch.no_grad():
        model_exact, model_few = copy.deepcopy(model), copy.deepcopy(model)
    convert(model_exact, EXACT)
    convert(model_few, FEW)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert_close(valid(model_exact(x, **keywords), keywords), valid(expected, keywords), "out")
            few = valid(model_few(x, **keywords), keywords)
            assert not torch.allclose(few, valid(expected, keywords))
    model_few.train()
    assert_close(valid(model_few(x, **keywords), keywords), few, "training")


def test_an_encoder_made_with_our_module():
    layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, dropout=0.0, batch_first=True, dtype=torch.float64)
    layer.self_attn = MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64, config=FEW)
    with pytest.warns(UserWarning, match="use_nested_tensor is False"):
        model = torch.nn.TransformerEncoder(layer, 2).eval()
    out = model(tokens(), src_key_padding_mask=padding())
    with torch.no_grad():
        assert torch.equal(model(tokens(), src_key_padding_mask=padding()), out)


def test_convert_keeps_the_modules():
    model = transformer()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    model.encoder.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(True))
    before = copy.deepcopy(model.state_dict())
    converted = convert(model, FEW)
    assert list(converted) == [
        "encoder.layers.0.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
    ]
    assert all(type(module) is MultiheadAttention and module is modules[name] for name, module in converted.items())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    model(tokens(), tokens()).square().sum().backward()
    optimizer.step()
    assert seen == [True]
    name = "encoder.layers.0.self_attn.in_proj_weight"
    assert not torch.equal(model.state_dict()[name], before[name])
    expected = model(tokens(), tokens())
    assert torch.equal(copy.deepcopy(model)(tokens(), tokens()), expected)
    assert "blocks_per_row=1" in repr(model)


def test_modules_can_be_pickled():
    model = encoder()
    convert(model, FEW)
    assert torch.equal(pickle.loads(pickle.dumps(model))(tokens()), model(tokens()))


def test_convert_with_configs_of_layers():
    exact, heads = MRAConfig(blocks_per_row=math.inf), MRAConfig(blocks_per_row=[1, 2])
    model = transformer()
    layers = {"decoder.*": heads, "*.multihead_attn": None, "encoder.layers.[0-3].self_attn": exact}
    converted = convert(model, layers=layers, blocks_per_row=3)
    assert {name: module.config for name, module in converted.items()} == {
        "encoder.layers.0.self_attn": exact,
        "decoder.layers.0.self_attn": heads,
    }
    assert type(model.decoder.layers[0].multihead_attn) is torch.nn.MultiheadAttention
    assert {module.config for module in convert(model, blocks_per_row=3).values()} == {MRAConfig(blocks_per_row=3)}
    alone = torch.nn.MultiheadAttention(WIDTH, HEADS)
    assert convert(alone, exact) == {"": alone}


class Own(torch.nn.MultiheadAttention):
    """A subclass."""


def test_convert_refuses_and_changes_nothing():
    model = transformer()
    for arguments, error, message in (
        ({"layers": {"encoder.*": EXACT, "encodr.*": FEW}}, ValueError, "'encodr.*', which matches none of 'encoder"),
        ({"layers": {"*": None}}, ValueError, "nothing to convert"),
        ({"layers": {"decoder.*": MRAConfig(blocks_per_row=[1, 2, 3])}}, ValueError, "2 heads of decoder.layers.0"),
        ({"blocks_per_row": [1, 2, 3]}, ValueError, "2 heads of encoder.layers.0.self_attn"),
        ({"layers": {"*": 4}}, TypeError, r"layers\['\*'\] must be a mra_attention.MRAConfig or None, got int"),
        ({"layers": {3: EXACT}}, TypeError, "got 3"),
        ({"layers": ["*"]}, TypeError, "layers must be a mapping"),
        ({"config": 3}, TypeError, "config must be"),
        ({"blocks": 3}, TypeError, "'blocks' is no argument"),
    ):
        with pytest.raises(error, match=message):
            convert(model, **arguments)
        assert not any(isinstance(module, MultiheadAttention) for module in model.modules())
        assert model.encoder.use_nested_tensor == transformer().encoder.use_nested_tensor
    with pytest.raises(ValueError, match=r"model has no torch\.nn\.MultiheadAttention to convert$"):
        convert(vision_model())
    with pytest.raises(ValueError, match="only subclasses of it, which are left alone: '0'"):
        convert(torch.nn.Sequential(Own(WIDTH, HEADS)))
    with pytest.raises(TypeError, match="model must be"):
        convert([model])


@pytest.mark.parametrize(("masks", "gradient"), [("nothing", False), ("causal", True), ("padding", True)])
def test_compile(masks, gradient):
    """Also after the model was compiled without it, and where torch would take its fused path."""
    model, keywords = encoder(), ENCODER_MASKS[masks]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.set_grad_enabled(gradient):
        expected = compiled(tokens(), **keywords)
        convert(model, FEW)
        out = compiled(tokens(), **keywords)
        assert_close(out, model(tokens(), **keywords), "out")
    assert not torch.allclose(valid(out, keywords), valid(expected, keywords))


def test_subclasses_that_are_left_alone_are_named():
    class Other(torch.nn.MultiheadAttention):
        pass

    model = torch.nn.ModuleList([torch.nn.MultiheadAttention(8, 2), Other(8, 2)])
    with pytest.warns(UserWarning, match=r"left alone, since they are subclasses .*: '1'"):
        assert list(convert(model)) == ["0"]
