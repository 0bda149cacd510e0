"""Decoding with the caches of transformers: what torch's attention gives, and what the whole sequence gives."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
import transformers_models as models
from helpers import named
from torch import Tensor
from transformers_models import EXACT, LENGTH, SMALL, build, error, padding, positions, tokens

NEW = 20
STEPS = (40, 41, 42, 50, 51, LENGTH)
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "prefill in chunks": {"prefill_chunk_size": 16},
}


def generate(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    fixed = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        return model.generate(ids, attention_mask=mask, **fixed, **options)


@pytest.mark.parametrize("name", [*models.DECODERS, "bart", "t5"])
def test_a_full_budget_generates_the_tokens_of_torch(name: str):
    model = build(name, EXACT)
    ids, mask = tokens(), padding("right" if name in models.BOTH else "left")
    for way, options in WAYS.items():
        if name in models.BOTH and way in ("prompt lookup", "prefill in chunks"):
            continue
        # Those two take one sequence, or none with padding.
        given = (ids[1:], mask[1:]) if way in ("prompt lookup", "prefill in chunks") else (ids, mask)
        with named(way):
            result = generate(model, *given, **options)
            with models.reference(name, model):
                assert torch.equal(result, generate(model, *given, **options))


def test_assisted_decoding_generates_the_same_tokens():
    for name in ("llama", "gemma3"):
        model, assistant = build(name, EXACT), build("mistral", EXACT)
        ids = tokens(1)
        expected = generate(model, ids, torch.ones_like(ids))
        assert torch.equal(generate(model, ids, torch.ones_like(ids), assistant_model=assistant), expected), name


def steps(model: Any, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
    """Return the logits of a sequence that is given in pieces."""
    logits, place = [], positions(mask)
    for start, stop in zip((0, *STEPS), STEPS, strict=False):
        piece = slice(start, stop)
        given = {"attention_mask": mask[:, :stop], "position_ids": place[:, piece]}
        logits.append(model(ids[:, piece], **given, cache=cache, use_cache=True).logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("name", [name for name in models.DECODERS if name != "llama4"])
def test_steps_give_at_small_budgets_what_the_whole_sequence_gives(name: str):
    model = build(name, SMALL)
    ids = tokens()
    for side in ("none", "left"):
        mask = padding(side)
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, position_ids=positions(mask)).logits[mask.bool()]
            for cache in (
                transformers.DynamicCache(config=model.config),
                transformers.StaticCache(config=model.config, max_cache_len=LENGTH + 9),
            ):
                with named((side, type(cache).__name__)):
                    assert error(steps(model, ids, mask, cache)[mask.bool()], expected) <= 1e-5


def test_a_mask_of_pairs_beside_a_cache_is_aligned_with_the_last_key():
    model = build("llama", SMALL)
    ids = tokens()
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    with torch.no_grad():
        expected = model(ids, attention_mask=torch.ones_like(ids)).logits
        cache = transformers.DynamicCache(config=model.config)
        model(ids[:, :60], cache=cache)
        for start, stop in ((60, 61), (61, LENGTH)):
            mask = visible[None, None, start:stop, :stop].expand(2, -1, -1, -1)
            assert (
                error(model(ids[:, start:stop], attention_mask=mask, cache=cache).logits, expected[:, start:stop])
                <= 1e-5
            )
