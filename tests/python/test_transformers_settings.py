"""Settings of MRA attention in models of transformers, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import transformers_models as models
from mra_attention import LayerConfigs, MRAConfig
from mra_attention.analysis import capture
from mra_attention.integrations.transformers import configure, register, settings
from transformers_models import EXACT, SMALL, SMALL_EVERYWHERE, build, error, padding, tokens

FEW = MRAConfig.from_dict(SMALL)
DEFAULTS = settings.Defaults(MRAConfig(blocks_per_row=6, mode="sparse"), MRAConfig(blocks_per_row=math.inf))


def settings_of(mra: Any, layer: int | None = 0, is_sliding: bool = False) -> MRAConfig:
    config = transformers.LlamaConfig(num_hidden_layers=4)
    if mra is not None:
        config.mra = mra
    return settings.of_layer(config, layer, is_sliding, DEFAULTS)


def test_later_settings_take_the_place_of_earlier_ones():
    mra = {
        "blocks_per_row": 3,
        "resolutions": [16, 1],
        "sliding": {"blocks_per_row": 2, "first_blocks": 0},
        "layers": {"1": {"blocks_per_row": "inf"}, "2": {"num_blocks": 7}},
    }
    assert settings_of(None) == DEFAULTS.config
    assert settings_of(None, is_sliding=True) == DEFAULTS.sliding
    assert settings_of({}) == DEFAULTS.config
    plain = MRAConfig(blocks_per_row=3, resolutions=(16, 1), mode="sparse")
    assert settings_of(mra) == settings_of({**mra, "layers": {}}, layer=None) == plain
    assert settings_of(mra, layer=1) == MRAConfig(blocks_per_row=math.inf, resolutions=(16, 1), mode="sparse")
    assert settings_of(mra, layer=2) == MRAConfig(blocks_per_row=3, resolutions=(16, 1), mode="sparse", num_blocks=7)
    sliding = MRAConfig(blocks_per_row=2, resolutions=(16, 1), first_blocks=0)
    assert settings_of(mra, is_sliding=True) == sliding
    assert settings_of(mra, layer=1, is_sliding=True).blocks_per_row == math.inf
    # The budget of all layers is not that of windows, which stay exact.
    exact = MRAConfig(blocks_per_row=math.inf, resolutions=(16, 1))
    assert settings_of({"blocks_per_row": 3, "num_blocks": 9, "resolutions": [16, 1]}, is_sliding=True) == exact
    assert settings_of({"layers": {3: {"blocks_per_row": [1.0, math.inf]}}}, layer=3).blocks_per_row == (1.0, math.inf)


@pytest.mark.parametrize(
    ("mra", "refusal", "message"),
    [
        ({"block_per_row": 4}, TypeError, r"config\.mra: 'block_per_row' is no argument and no setting"),
        ({"layers": {"0": {"modes": "full"}}}, TypeError, r"config\.mra\['layers'\]\['0'\]: 'modes' is no"),
        ({"sliding": {"mode": "dense"}}, ValueError, r"config\.mra\['sliding'\]: mode must be 'full' or 'sparse'"),
        ({"resolutions": [256, 16, 1], "num_blocks": 3}, ValueError, r"config\.mra: num_blocks=3 is for two"),
        ({"layers": {"4": {}}}, ValueError, r"has settings of layers \['4'\], but there are 4"),
        ({"layers": [{}]}, TypeError, r"must map numbers of layers to settings, got \[\{\}\]"),
        ({"layers": {"first": {}}}, TypeError, "must map numbers of layers to settings"),
        ({"layers": {"0": 4}}, TypeError, r"config\.mra\['layers'\]\['0'\] must be a dictionary of settings, got 4"),
        ({"blocks_per_row": torch.ones(4)}, TypeError, r"config\.mra must hold what JSON has"),
        (MRAConfig(), TypeError, r"MRAConfig\(\.\.\.\)\.to_dict\(\), got MRAConfig"),
    ],
)
def test_what_is_no_setting_is_refused(mra: Any, refusal: type[Exception], message: str):
    for is_sliding in (True, False) if "sliding" not in str(mra) else (True,):
        with pytest.raises(refusal, match=message):
            settings_of(mra, is_sliding=is_sliding)


def test_settings_of_layers_want_numbered_layers():
    with pytest.raises(ValueError, match="does not number its attention layers"):
        settings_of({"layers": {"0": {}}}, layer=None)


def test_configure_checks_before_it_writes():
    model = build("bart", EXACT)
    for wrong in ({"modes": 1}, {"sliding": {"mode": 1}}, {"layers": {"1": {"modes": 1}}}, 4):
        with pytest.raises(TypeError):
            configure(model, wrong)  # type: ignore[arg-type]
    assert model.config.mra == EXACT
    configure(model, None)
    assert not hasattr(model.config, "mra")
    configure(model, MRAConfig(blocks_per_row=3))
    assert model.config.mra == MRAConfig(blocks_per_row=3).to_dict()


def test_configure_reaches_parts_with_copies_of_the_config():
    model = build("t5", SMALL)
    assert model.encoder.config is not model.config
    assert model.encoder.config.mra == model.decoder.config.mra == model.config.mra == SMALL


def test_settings_are_saved_and_loaded_with_the_model(tmp_path: Path):
    mra = {**SMALL, "sliding": {"blocks_per_row": "inf"}, "layers": {"1": {"blocks_per_row": "inf"}}}
    model = build("mistral", mra, torch.float32)
    ids = tokens()
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["mra"] == mra
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="mra")
    assert loaded.config.mra == mra
    assert torch.equal(loaded(ids).logits, expected)


def test_a_change_of_settings_is_seen_at_the_next_call():
    model = build("llama", EXACT)
    ids = tokens()
    exact = model(ids).logits
    model.config.mra["blocks_per_row"] = 1
    approximate = model(ids).logits
    assert error(approximate, exact) > 1e-3
    model.config.mra["layers"] = {"0": {"blocks_per_row": "inf"}, "1": {"blocks_per_row": "inf"}}
    assert torch.equal(model(ids).logits, exact)
    model.config.mra["layers"].pop("1")
    assert not torch.equal(model(ids).logits, exact)
    assert not torch.equal(model(ids).logits, approximate)


def test_an_image_model_takes_a_grid():
    pixels = torch.randn(2, 3, 32, 32)  # 8 x 8 patches and a class token
    results = {}
    for budget in (2, "inf"):
        for grid in (None, [8, 8]):
            model = build("vit", SMALL | {"blocks_per_row": budget, "grid": grid})
            results[budget, grid is None] = model(pixels).last_hidden_state
    assert error(results["inf", False], results["inf", True]) < 1e-5
    assert error(results[2, False], results[2, True]) > 1e-3
    with pytest.raises(ValueError, match=r"is_causal=True.*grid=\(8, 8\)"):
        build("llama", SMALL | {"grid": [8, 8]})(tokens())


def test_windows_are_exact_by_default():
    model = build("mistral", SMALL)
    ids, mask = tokens(), padding("left")
    with torch.no_grad():
        result = model(ids, attention_mask=mask).logits[mask.bool()]
        with models.reference("mistral", model):
            expected = model(ids, attention_mask=mask).logits[mask.bool()]
        configure(model, SMALL_EVERYWHERE)
        approximate = model(ids, attention_mask=mask).logits[mask.bool()]
    assert error(result, expected) <= 1e-5
    assert error(approximate, expected) > 1e-3


def test_register_sets_the_defaults_of_all_models():
    model = build("gemma3")
    ids = tokens()
    results = []
    for given in (
        {},
        {"config": MRAConfig(resolutions=(8, 1), blocks_per_row=1)},
        {
            "config": MRAConfig(resolutions=(8, 1), blocks_per_row=1),
            "sliding": MRAConfig(resolutions=(8, 1), blocks_per_row=1),
        },
    ):
        register(**given)
        results.append(model(ids).logits)
    assert all(not torch.equal(results[i], results[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    register(MRAConfig(resolutions=(8, 1), num_blocks=1), sliding=MRAConfig(resolutions=(8, 1), blocks_per_row=1))
    configure(model, {"resolutions": [8, 1], "blocks_per_row": 1, "num_blocks": None})
    assert torch.equal(model(ids).logits, results[2])
    register()
    configure(model, None)
    assert torch.equal(model(ids).logits, results[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"config": {"blocks_per_row": 4}}, "config must be None or a mra_attention.MRAConfig, got dict"),
        ({"sliding": 4}, "sliding must be None or a mra_attention.MRAConfig, got int"),
        ({"ignored_arguments": [4]}, "ignored_arguments must be names of arguments, got 4"),
    ],
)
def test_register_checks_its_arguments(given: dict[str, Any], message: str):
    with pytest.raises(TypeError, match=message):
        register(**given)


def test_weights_of_attention_are_refused():
    model = build("llama", EXACT)
    message = "output_attentions=True: MRA attention never has the matrix of weights.*attn_implementation='eager'"
    with pytest.raises(NotImplementedError, match=message):
        model(tokens(), output_attentions=True)
    with pytest.raises(NotImplementedError, match=message):
        model.generate(tokens(), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    inputs = {"input_features": torch.randn(2, 8, 120).double(), "decoder_input_ids": tokens(length=5)}
    with pytest.raises(NotImplementedError, match=message):
        build("whisper", EXACT)(**inputs, output_attentions=True)
    with pytest.raises(ValueError, match="set it to 'eager' instead"):
        model.config.output_attentions = True
    assert len(model(tokens(), output_hidden_states=True).hidden_states) == 3
    model.set_attn_implementation("eager")
    assert len(model(tokens(), output_attentions=True).attentions) == 2
    model.config.output_attentions = True  # which no layer is told of
    model.set_attn_implementation("mra")
    with pytest.raises(NotImplementedError, match=message):
        model(tokens())


def test_unknown_arguments_are_refused_unless_they_are_said_to_be_harmless():
    model = build("llama", EXACT)
    ids = tokens()
    expected = model(ids).logits
    with pytest.raises(NotImplementedError, match=r"chunks=3: .* does not know this argument; .*'chunks'"):
        model(ids, chunks=3)
    with pytest.raises(NotImplementedError, match="chunks=Tensor: "):
        model(ids, chunks=ids)
    register(ignored_arguments=["chunks"])
    assert torch.equal(model(ids, chunks=3).logits, expected)
    register(ignored_arguments="chunks")
    assert torch.equal(model(ids, chunks=3).logits, expected)
    register()
    assert torch.equal(model(ids, chunks=None, num_items_in_batch=torch.tensor(4)).logits, expected)


def test_older_versions_of_transformers_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", lambda batch_size, cache_position, kv_length: None)
    with pytest.raises(ImportError, match=f"transformers {transformers.__version__} calls its mask functions without"):
        register()


def test_settings_are_copied_and_layers_must_exist():
    model, given = build("llama"), {"layers": {"1": {"blocks_per_row": 3}}}
    configure(model, given)
    given["layers"]["1"]["blocks_per_row"] = 5
    assert model.config.mra["layers"]["1"]["blocks_per_row"] == 3
    with pytest.raises(ValueError, match=r"settings of layers \['2'\], but there are 2"):
        configure(model, {"layers": {"2": {}}})


def test_models_that_compute_attention_by_themselves_are_refused():
    config = transformers.LongformerConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
    )
    with pytest.raises(ValueError, match="LongformerModel computes attention by itself"):
        configure(transformers.LongformerModel(config), {"blocks_per_row": 2})


def test_layers_by_name():
    """Names become numbers in the config of the part, and a layer computes with its settings."""
    exact, few = MRAConfig(blocks_per_row=math.inf), FEW
    heads = MRAConfig(resolutions=(8, 1), blocks_per_row=(1, 2, 3, math.inf))
    model, ids = build("llama", EXACT), tokens()
    expected = model(ids).logits
    configure(model, few, layers={"model.layers.*": exact})
    assert error(model(ids).logits, expected) < 1e-10
    configure(model, {"layers": {"0": SMALL, "1": EXACT}}, layers={"model.layers.1.self_attn": heads})
    assert model.config.mra == {"layers": {"0": SMALL, "1": heads.to_dict()}}
    assert error(model(ids).logits, expected) > 1e-3
    configure(model, None, layers=LayerConfigs({"*": few, "model.layers.0.*": exact}))
    assert model.config.mra == {"layers": {"0": exact.to_dict(), "1": few.to_dict()}}
    configure(model, None, layers={})
    assert not hasattr(model.config, "mra")

    # The parts of T5 have configs of their own; self-attention and cross-attention have the same numbers.
    model = build("t5", EXACT)
    configure(model, EXACT, layers={"encoder.*": few, "decoder.block.1.*": heads})
    assert model.encoder.config.mra["layers"] == {"0": few.to_dict(), "1": few.to_dict()}
    assert model.decoder.config.mra["layers"] == {"1": heads.to_dict()}
    assert model.config.mra == EXACT


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("llama", {"model.layers.2.self_attn": FEW}, r"'model\.layers\.2\.self_attn', which matches none of 'model\.l"),
        ("llama", {"model.layers.0.mlp": FEW}, "matches none of"),
        ("llama", {"model.layers.0.self_attn": None}, r"None for 'model\.layers\.0.*blocks_per_row=math\.inf"),
        ("vit", {"*": FEW}, "this model does not number those"),
        ("t5", {"*.SelfAttention": FEW}, "but both are number 0 in one config"),
        ("bart", {"model.encoder.*": FEW, "model.decoder.*": MRAConfig()}, "but both are number 0 in one config"),
        ("bart", {"model.encoder.*": MRAConfig()}, "but both are number 0 in one config"),
    ],
)
def test_layers_that_cannot_be_named(name: str, layers: dict[str, Any], message: str):
    model = build(name, EXACT)
    with pytest.raises(ValueError, match=message):
        configure(model, SMALL, layers=layers)
    assert model.config.mra == EXACT


def test_what_was_captured_and_configured_has_the_same_names():
    for name in ("bert", "qwen2", "gpt_oss"):
        model = build(name, EXACT)
        layers = capture(model, tokens()).layers()
        configure(model, EXACT, layers={layers[1]: FEW})
        assert model.config.mra["layers"] == {"1": FEW.to_dict()}
