"""MRA attention in the models of transformers: what torch's attention gives, and what each sequence gets alone."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
import transformers_models as models
from helpers import named
from mra_attention.integrations.transformers import configure
from torch import Tensor
from transformers import masking_utils
from transformers_models import EXACT, LENGTH, PADDED, SMALL_EVERYWHERE, build, error, padding, positions, tokens

TOLERANCE = 1e-5


def inputs_of(name: str, side: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return the arguments of a model, and which of its outputs are of valid tokens."""
    if name in models.IMAGES:
        return {"pixel_values": torch.randn(2, 3, 32, 32)}, torch.ones(2, 65, dtype=torch.bool)
    mask, all_targets = padding(side), torch.ones(2, 40, dtype=torch.bool)
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 120), "decoder_input_ids": tokens(length=40)}, all_targets
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    if name in models.BOTH:
        return {**inputs, "decoder_input_ids": tokens(length=40)}, all_targets
    return inputs, mask.bool()


def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs)[0]


@pytest.mark.parametrize("name", [*models.ENCODERS, *models.DECODERS, *models.BOTH, *models.IMAGES])
def test_a_full_budget_gives_what_torch_gives(name: str):
    model = build(name, EXACT, torch.float32)
    for side in ("none", "right", "left"):
        inputs, valid = inputs_of(name, side)
        with torch.no_grad(), named(side):
            result = output(model, inputs)
            with models.reference(name, model):
                expected = output(model, inputs)
            assert error(result[valid], expected[valid]) <= TOLERANCE
            configure(model, SMALL_EVERYWHERE)
            approximate = output(model, inputs)
            configure(model, EXACT)
            # So that attention, and ours, decides what was compared; chunks of 32 have few blocks to leave out.
            assert error(approximate[valid], expected[valid]) > 1e-3


@pytest.mark.parametrize("name", ["bert", "modernbert", "vit", "llama", "mistral", "gemma3", "llama4"])
def test_gradients_at_a_full_budget_are_those_of_torch(name: str):
    model = build(name, EXACT)
    inputs, valid = inputs_of(name, "right")
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    weight = torch.randn_like(output(model, inputs)[valid])
    gradients = []
    for use_torch in (True, False):
        model.zero_grad()
        if use_torch:
            with models.reference(name, model):
                (output(model, inputs)[valid] * weight).sum().backward()
        else:
            (output(model, inputs)[valid] * weight).sum().backward()
        gradients.append({key: x.grad for key, x in model.named_parameters() if x.grad is not None})
    expected, result = gradients
    assert expected.keys() == result.keys()
    for key, gradient in expected.items():
        # The largest of all sets the scale: some are zero but for rounding, such as that of a bias of keys.
        with named(key):
            assert float((result[key] - gradient).abs().max()) <= TOLERANCE * max(
                float(x.abs().max()) for x in expected.values()
            )


@pytest.mark.parametrize("name", [*models.ENCODERS, *models.DECODERS])
def test_padded_sequences_get_at_small_budgets_what_they_get_alone(name: str):
    model = build(name, SMALL_EVERYWHERE)
    ids = tokens()
    for side in ("right", "left"):
        mask = padding(side)
        kept = slice(PADDED, None) if side == "left" else slice(None, LENGTH - PADDED)
        batch = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
        for item, alone in enumerate((ids[:1, kept], ids[1:])):
            ones = torch.ones_like(alone)
            expected = model(alone, attention_mask=ones, position_ids=positions(ones)).logits[0]
            with named((side, item)):
                assert error(batch[item][mask[item].bool()], expected) <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in models.DECODERS if name not in ("llama4", "gemma2")])
def test_packed_sequences_get_at_small_budgets_what_they_get_alone(name: str):
    model = build(name, SMALL_EVERYWHERE)
    ids, lengths = tokens(), ((20, LENGTH - 20), (33, LENGTH - 33))
    packed_positions = torch.stack([torch.cat([torch.arange(n) for n in item]) for item in lengths])
    batch = model(ids, position_ids=packed_positions, use_cache=False).logits
    for item, (first, _) in enumerate(lengths):
        for part in (slice(None, first), slice(first, None)):
            with named((item, part)):
                assert error(batch[item, part], model(ids[item : item + 1, part]).logits[0]) <= TOLERANCE


def test_packed_sequences_are_kept_apart_where_a_model_does_not_tell_the_mask_function(monkeypatch: pytest.MonkeyPatch):
    """As GPT-OSS does not."""
    create = masking_utils.create_causal_mask
    path = "transformers.models.llama.modeling_llama.create_causal_mask"
    model = build("llama", SMALL_EVERYWHERE)
    ids, of_packed = tokens(), torch.cat([torch.arange(20), torch.arange(LENGTH - 20)])[None]
    expected = model(ids, position_ids=of_packed, use_cache=False).logits
    monkeypatch.setattr(path, lambda position_ids, **given: create(**given))
    assert torch.equal(model(ids, position_ids=of_packed, use_cache=False).logits, expected)
    # Rising positions are no packing, whatever they begin with, nor are those beside a mask.
    whole = model(ids).logits
    assert torch.equal(model(ids, position_ids=torch.arange(LENGTH)[None]).logits, whole)
    ones = torch.ones_like(ids)
    with_mask = model(ids, attention_mask=ones, position_ids=of_packed, use_cache=False).logits
    assert error(with_mask, expected) > 1e-3


def test_packed_sequences_may_be_given_by_their_boundaries():
    model = build("mistral", SMALL_EVERYWHERE)
    ids, boundaries = tokens(1), torch.tensor([0, 20, LENGTH], dtype=torch.int32)
    of_packed = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)])[None]
    given = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 55, "max_length_k": 55}
    expected = model(ids, position_ids=of_packed, use_cache=False).logits
    assert torch.equal(model(ids, position_ids=of_packed, use_cache=False, **given).logits, expected)
    with pytest.raises(NotImplementedError, match="a batch of 2"):
        model(tokens(2), use_cache=False, **given)
    with pytest.raises(ValueError, match="given together"):
        model(ids, use_cache=False, cu_seq_lens_q=boundaries)


@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_decoders_learn_nothing_from_later_tokens_in_cross_attention(name: str):
    model = build(name, SMALL_EVERYWHERE)
    inputs, _ = inputs_of(name, "right")
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    changed = {**inputs, "decoder_input_ids": inputs["decoder_input_ids"].clone()}
    changed["decoder_input_ids"][:, 30:] = 3
    with torch.no_grad():
        before, after = output(model, inputs), output(model, changed)
    assert error(after[:, :30], before[:, :30]) <= 1e-10
    assert error(after, before) > 1e-3


def test_decoders_that_say_so_in_other_words_learn_nothing_from_later_tokens():
    model = build("gpt2_cross", SMALL_EVERYWHERE)
    ids, states = tokens(), torch.randn(2, LENGTH, 32, dtype=torch.float64)
    changed = ids.clone()
    changed[:, 30:] = 3
    with torch.no_grad():
        before, after = (model(x, encoder_hidden_states=states, use_cache=False).logits for x in (ids, changed))
    assert error(after[:, :30], before[:, :30]) <= 1e-10
    assert error(after, before) > 1e-3


def test_boundaries_beside_a_cache_align_the_last_tokens():
    model = build("llama", EXACT)
    ids = tokens(1)
    whole = model(ids).logits
    cache = transformers.DynamicCache(config=model.config)
    model(ids[:, :50], cache=cache, use_cache=True)
    boundaries = {"cu_seq_lens_q": torch.tensor([0, LENGTH - 50]), "cu_seq_lens_k": torch.tensor([0, LENGTH])}
    rest = model(ids[:, 50:], cache=cache, use_cache=True, **boundaries).logits
    assert error(rest, whole[:, 50:]) <= 1e-10


def test_config_is_causal_makes_a_decoder_see_both_directions():
    model = build("llama", EXACT)
    ids, mask = tokens(), padding("right")
    model.config.is_causal = False
    result = model(ids, attention_mask=mask, is_causal=False).logits
    with models.reference("llama", model):
        expected = model(ids, attention_mask=mask, is_causal=False).logits
    assert error(result, expected) <= TOLERANCE


def test_masks_of_pairs_may_be_given():
    model = build("llama", EXACT)
    ids = tokens()
    visible = torch.rand(2, 1, LENGTH, LENGTH) < 0.3
    visible |= torch.eye(LENGTH, dtype=torch.bool)
    for mask in (visible, torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)):
        result = model(ids, attention_mask=mask).logits
        with models.reference("llama", model):
            assert error(result, model(ids, attention_mask=mask).logits) <= TOLERANCE


def test_parts_of_a_model_may_have_attention_and_settings_of_their_own():
    """Gemma 3 with images, the tokens of which see each other in both directions."""
    model = build("gemma3_images", EXACT)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    ids = tokens()
    ids[ids == model.config.image_token_id] = 3
    ids[:, 10:14] = model.config.image_token_id
    kinds = (ids == model.config.image_token_id).long()
    given = {"input_ids": ids, "pixel_values": images, "token_type_ids": kinds}
    with torch.no_grad():
        result = model(**given).logits
        with models.reference("gemma3_images", model):
            expected = model(**given).logits
        assert error(result, expected) <= TOLERANCE
        text = model.model.language_model
        configure(text, SMALL_EVERYWHERE)
        assert (text.config.mra, model.config.vision_config.mra) == (SMALL_EVERYWHERE, EXACT)
        assert error(model(**given).logits, expected) > 1e-3
        model.set_attn_implementation({"text_config": "sdpa", "vision_config": "mra"})
        assert error(model(**given).logits, expected) <= TOLERANCE


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_no_gradient(use_reentrant: bool):
    model = build("mistral", SMALL_EVERYWHERE).train()
    ids, mask = tokens(), padding("left")
    gradients = []
    for layer_function in (None, torch.utils.checkpoint.checkpoint):
        model.zero_grad()
        for layer in model.model.layers if layer_function else ():
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = lambda function, *args: torch.utils.checkpoint.checkpoint(
                function, *args, use_reentrant=use_reentrant
            )
        model(ids, attention_mask=mask, use_cache=False).logits.square().sum().backward()
        gradients.append([x.grad.clone() for x in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_compiled_models_give_what_others_give():
    for name, mra, mask in (("llama", None, None), ("mistral", SMALL_EVERYWHERE, padding("left"))):
        model = build(name, mra)
        ids = tokens()
        valid = torch.ones_like(ids).bool() if mask is None else mask.bool()
        with torch.no_grad(), named(name):
            expected = model(ids, attention_mask=mask, use_cache=False).logits
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            result = compiled(ids, attention_mask=mask, use_cache=False).logits
            assert error(result[valid], expected[valid]) <= TOLERANCE


def test_attention_dropout_is_that_of_training():
    model = build("llama", SMALL_EVERYWHERE)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    ids = tokens()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    torch.manual_seed(1)
    first = model(ids).logits
    assert not torch.equal(first, model(ids).logits)
    torch.manual_seed(1)
    assert torch.equal(model(ids).logits, first)


def test_the_package_does_not_import_transformers():
    code = "import sys, mra_attention; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
