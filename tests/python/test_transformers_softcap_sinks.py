"""Models of transformers with a softcap (Gemma 2), sinks (GPT-OSS) and a learned bias (T5)."""

from __future__ import annotations

import inspect

import mra_attention
import pytest
import torch
import transformers
import transformers_models as models
from helpers import named
from mra_attention.integrations.transformers import configure
from test_transformers_decoding import generate, steps
from transformers_models import (
    EXACT,
    LENGTH,
    PADDED,
    SMALL,
    SMALL_EVERYWHERE,
    build,
    error,
    padding,
    positions,
    tokens,
)

pytestmark = pytest.mark.skipif(
    "sinks" not in inspect.signature(mra_attention.scaled_dot_product_attention).parameters,
    reason="the core has no softcap, sinks and gradient of a bias",
)


@pytest.mark.parametrize("name", models.CAPPED)
def test_a_full_budget_gives_what_eager_attention_gives(name: str):
    model = build(name, EXACT)
    ids = tokens()
    for side in ("none", "left", "right"):
        mask = padding(side)
        valid = mask.bool()
        with torch.no_grad(), named(side):
            result = model(ids, attention_mask=mask).logits[valid]
            with models.reference(name, model):
                expected = model(ids, attention_mask=mask).logits[valid]
            assert error(result, expected) <= 1e-5
            configure(model, SMALL_EVERYWHERE)
            assert error(model(ids, attention_mask=mask).logits[valid], expected) > 1e-3
            configure(model, EXACT)


def test_softcap_and_sinks_are_not_left_out():
    ids = tokens()
    gemma, oss = build("gemma2_capped", EXACT), build("gpt_oss", EXACT)
    with torch.no_grad():
        capped, with_sinks = gemma(ids).logits, oss(ids).logits
        for layer in gemma.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        for layer in oss.model.layers:
            layer.self_attn.sinks.fill_(-torch.inf)
        assert error(gemma(ids).logits, capped) > 1e-3
        assert error(oss(ids).logits, with_sinks) > 1e-3


@pytest.mark.parametrize("name", models.CAPPED)
def test_a_full_budget_generates_the_tokens_of_eager_attention(name: str):
    model = build(name, EXACT)
    ids, mask = tokens(), padding("left")
    for options in ({}, {"cache_implementation": "static"}, {"num_beams": 3}):
        with named(options):
            result = generate(model, ids, mask, **options)
            with models.reference(name, model):
                assert torch.equal(result, generate(model, ids, mask, **options))


@pytest.mark.parametrize("name", models.CAPPED)
def test_sequences_get_at_small_budgets_what_they_get_alone(name: str):
    model = build(name, SMALL_EVERYWHERE)
    ids = tokens()
    for side, kept in (("right", slice(None, LENGTH - PADDED)), ("left", slice(PADDED, None))):
        mask = padding(side)
        with torch.no_grad(), named(side):
            batch = model(ids, attention_mask=mask, position_ids=positions(mask)).logits[0]
            assert error(batch[mask[0].bool()], model(ids[:1, kept]).logits[0]) <= 1e-5
    of_packed = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)])[None]
    with torch.no_grad():
        packed = model(ids[:1], position_ids=of_packed, use_cache=False).logits[0]
        for part in (slice(None, 20), slice(20, None)):
            assert error(packed[part], model(ids[:1, part]).logits[0]) <= 1e-5


@pytest.mark.parametrize("name", models.CAPPED)
def test_steps_give_at_small_budgets_what_the_whole_sequence_gives(name: str):
    model = build(name, SMALL)
    ids, mask = tokens(), padding("left")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions(mask)).logits[mask.bool()]
        cache = transformers.DynamicCache(config=model.config)
        assert error(steps(model, ids, mask, cache)[mask.bool()], expected) <= 1e-5


@pytest.mark.parametrize("name", ["gpt_oss", "gemma2_capped", "t5"])
def test_gradients_at_a_full_budget_are_those_of_the_reference(name: str):
    """That of the sinks and of T5's bias too."""
    model = build(name, EXACT)
    inputs = {"input_ids": tokens()}
    if name == "t5":
        inputs |= {"decoder_input_ids": tokens(length=40), "attention_mask": padding("right")}
    gradients = []
    for use_reference in (True, False):
        model.zero_grad()
        if use_reference:
            with models.reference(name, model):
                model(**inputs).logits.square().sum().backward()
        else:
            model(**inputs).logits.square().sum().backward()
        gradients.append({key: x.grad for key, x in model.named_parameters() if x.grad is not None})
    expected, result = gradients
    assert expected.keys() == result.keys()
    assert any("sinks" in key or "relative_attention_bias" in key for key in expected) or name == "gemma2_capped"
    for key, gradient in expected.items():
        with named(key):
            assert error(result[key], gradient) <= 1e-4
