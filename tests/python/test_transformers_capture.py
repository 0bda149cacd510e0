"""`analysis.capture` of models of transformers, whose layers compute "sdpa" or "mra"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close, named
from mra_attention.analysis import Capture, capture
from torch import Tensor
from transformers import BatchEncoding
from transformers_models import EXACT, LENGTH, build, padding, tokens

HEADS = 4


def captured(model: Any, implementation: str, batch: dict[str, Any]) -> Capture:
    """Capture with this implementation; the logits are those without."""
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        expected = model(**batch).logits
    results = []
    calls = capture(model, lambda model: results.append(model(**batch).logits))
    assert torch.equal(results[0], expected)
    return calls


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_decoders(side):
    """Values are what the projections return, masks are told by what they say, in both implementations."""
    for name, windows in {"llama": [(-1, -1), (-1, -1)], "qwen2": [(15, 0), (-1, -1)]}.items():
        model = build(name, EXACT)
        batch = {"input_ids": tokens(), "attention_mask": padding(side)}
        projected: list[Tensor] = []
        for layer in model.model.layers:
            layer.self_attn.v_proj.register_forward_hook(lambda module, inputs, out, to=projected: to.append(out))
        for implementation in ("mra", "sdpa"):
            with named((name, implementation)):
                projected.clear()
                calls = captured(model, implementation, batch)
                assert calls.layers() == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
                for call, out, window in zip(calls, projected[2:], windows, strict=True):
                    value = out.view(2, LENGTH, 2, 8).transpose(1, 2)
                    if call.value.shape[1] == HEADS:  # transformers repeats heads where it has a mask of pairs
                        value = value.repeat_interleave(2, 1)
                    assert torch.equal(call.value, value)
                    assert (call.is_causal, call.window_size, call.scale) == (True, window, 8**-0.5)
                    mask = None if side == "none" else padding(side).bool()[:, None, None]
                    assert (call.attn_mask is None) if mask is None else torch.equal(call.attn_mask, mask)


def test_encoders_take_a_batch_encoding():
    model = build("bert", EXACT)
    model.set_attn_implementation("sdpa")
    batch = BatchEncoding({"input_ids": tokens(), "attention_mask": padding("right")})
    calls = capture(model, [batch, batch], layers="*.1.*")
    assert calls.layers() == ["bert.encoder.layer.1.attention.self"]
    assert len(calls) == 2
    assert torch.equal(calls[0].attn_mask, padding("right").bool()[:, None, None])
    assert not calls[0].is_causal


def test_softcap_sinks_and_biases():
    model = build("gemma2_capped", EXACT)
    assert {call.softcap for call in captured(model, "mra", {"input_ids": tokens()})} == {1.0}
    model = build("gpt_oss", EXACT)
    for call, layer in zip(captured(model, "mra", {"input_ids": tokens()}), model.model.layers, strict=True):
        assert torch.equal(call.sinks, layer.self_attn.sinks)
    model = build("t5", EXACT)
    batch = {"input_ids": tokens(), "decoder_input_ids": tokens(length=20)}
    for implementation in ("mra", "sdpa"):
        call = captured(model, implementation, batch)[0]
        bias = model.encoder.block[0].layer[0].SelfAttention.compute_bias(LENGTH, LENGTH)
        assert_close(call.attn_mask, bias.detach(), "bias")


def test_packed_sequences_are_calls_each():
    positions = torch.cat([torch.arange(30), torch.arange(LENGTH - 30)])[None]
    packed = {"input_ids": tokens(1), "position_ids": positions, "use_cache": False}
    model = build("llama", EXACT)
    ours, torchs = (captured(model, implementation, packed) for implementation in ("mra", "sdpa"))
    assert [(call.layer, call.key.shape[2], call.is_causal) for call in ours] == [
        ("model.layers.0.self_attn", 30, True),
        ("model.layers.0.self_attn", LENGTH - 30, True),
        ("model.layers.1.self_attn", 30, True),
        ("model.layers.1.self_attn", LENGTH - 30, True),
    ]
    documents = positions.eq(0).cumsum(-1)
    shown = (documents == documents.mT) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    assert torch.equal(torchs[0].attn_mask[0, 0], shown), "no padding, causality or window says this"


def test_steps_of_generation():
    """The one query of a step is beside the last key, as in the whole sequence."""
    model, ids = build("llama", EXACT), tokens(1, 20)

    def generate(model: Any) -> Tensor:
        return model.generate(ids, max_new_tokens=3, do_sample=False)

    for implementation in ("mra", "sdpa"):
        model.set_attn_implementation(implementation)
        calls = capture(model, generate, layers="model.layers.0.*")
        assert [(call.query.shape[2], call.key.shape[2]) for call in calls] == [(20, 20), (1, 21), (1, 22)]
        assert [call.causal_alignment for call in calls[1:]] == ["lower_right"] * 2
        # The cache holds what the steps before have written.
        for call in calls[1:]:
            assert torch.equal(call.key[:, :2, :20], calls[0].key[:, :2])


def test_eager_attention_is_refused():
    model = build("llama", EXACT)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r'LlamaForCausalLM made no call.*model.set_attn_implementation\("sdpa"\)'):
        capture(model, tokens())
