"""`LayerConfigs`, and settings of single layers in `replace_sdpa`; those of `convert` are in test_nn.py."""

from __future__ import annotations

import math

import mra_attention
import pytest
import torch
import torch.nn.functional as F
from helpers import named
from models import EXACT, HEADS, encoder, qkv, tokens, vision_model
from mra_attention import FallbackWarning, LayerConfigs, MRAConfig, replace_sdpa
from mra_attention.analysis import AttentionCall, capture
from mra_attention.nn import convert
from torch import Tensor

FEW = MRAConfig(resolutions=(8, 1), blocks_per_row=1)
MORE = MRAConfig(resolutions=(8, 1), blocks_per_row=(2.0, math.inf))
DENSE = MRAConfig(blocks_per_row=math.inf)


def test_the_last_pattern_that_matches_counts():
    layers = LayerConfigs({"layers.*": FEW, "layers.1?.self_attn": None, "layers.12.self_attn": MORE})
    for name, expected in {
        "layers.0.self_attn": FEW,
        "layers.10.self_attn": None,
        "layers.12.self_attn": MORE,
        "other": DENSE,
    }.items():
        assert layers.of_layer(name, DENSE) is expected, name
    assert layers.without_layers(["layers.0.self_attn", "other"]) == ["layers.1?.self_attn", "layers.12.self_attn"]
    assert (len(layers), list(layers)[2], layers["layers.*"]) == (3, "layers.12.self_attn", FEW)


def test_json():
    layers = LayerConfigs({"a": MORE, "b.*": None, "c": DENSE})
    again = LayerConfigs.from_json(layers.to_json())
    assert again == layers == {"a": MORE, "b.*": None, "c": DENSE}
    assert list(again) == ["a", "b.*", "c"], "the order says which counts"
    with pytest.raises(TypeError, match="'modes' is no"):
        LayerConfigs.from_json('{"a": {"modes": 1}}')
    with pytest.raises(ValueError, match="must be a JSON object"):
        LayerConfigs.from_json("[]")


def test_what_is_no_config_of_layers_is_refused():
    for wrong, message in (({"a": 4}, r"layers\['a'\] must be"), ({4: FEW}, "got 4"), ([FEW], "must be a mapping")):
        for function in (LayerConfigs, lambda layers: replace_sdpa(layers=layers)):
            with pytest.raises(TypeError, match=message):
                function(wrong)


def test_replaced_layers_have_their_configs():
    """Each layer computes what the direct call with its config gives; all others have the default."""
    model, x, projected = vision_model(), tokens(), []
    for layer in (0, 2):
        model[layer].proj.register_forward_pre_hook(lambda module, inputs: projected.append(inputs[0]))
    for layers, configs in (
        ({"2": MORE}, [FEW, MORE]),
        (LayerConfigs({"*": MORE, "0": DENSE}), [DENSE, MORE]),
        ({"0": None}, [None, FEW]),
    ):
        projected.clear()
        replaced = replace_sdpa(FEW, min_length=0, layers=layers)
        calls = capture(model, replaced(lambda model: model(x)))
        with named(layers):
            for call, given, out in zip(calls, configs, projected, strict=True):
                assert torch.equal(out.unflatten(-1, (HEADS, -1)).transpose(1, 2), attend(call, given))
            assert [row.taken for row in replaced.report()] == [given is not None for given in configs]
            assert replaced.report().unmatched == ()


def attend(call: AttentionCall, config: MRAConfig | None) -> Tensor:
    inputs = (call.query, call.key, call.value)
    if config is None:
        return F.scaled_dot_product_attention(*inputs)
    return mra_attention.scaled_dot_product_attention(*inputs, config=config)


def test_names_that_no_layer_has_are_reported():
    with replace_sdpa(FEW, min_length=0, layers={"layers.0.self_attn": MORE, "layers.7.*": MORE}) as replaced:
        assert replaced.report().unmatched == ("layers.0.self_attn", "layers.7.*")
        encoder()(tokens())
    assert replaced.report().unmatched == ("layers.7.*",)
    assert str(replaced.report()).endswith("2 calls taken, 0 not\nlayers without a call: 'layers.7.*'")
    assert "without" not in str(replace_sdpa().report())


def test_replaced_and_converted_models_are_the_same():
    layers, x = LayerConfigs({"layers.0.*": MORE}), tokens()
    with replace_sdpa(FEW, min_length=0, layers=layers):
        expected = encoder()(x)
    model = encoder()
    convert(model, FEW, layers=layers)
    assert torch.equal(model(x), expected)
    assert not torch.allclose(expected, encoder()(x))


def test_compiled_code_has_no_layers():
    inputs = qkv()
    torch._dynamo.reset()
    compiled = torch.compile(F.scaled_dot_product_attention, backend="aot_eager")
    with replace_sdpa(**EXACT, layers={"*": FEW}) as replaced:
        with pytest.warns(FallbackWarning, match="compiled code does not know its layers"):
            out = compiled(*inputs)
        assert replaced.report().taken == 0
    assert torch.equal(out, F.scaled_dot_product_attention(*inputs))
