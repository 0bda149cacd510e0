"""The mask function of the integration of transformers: what it describes, and that nothing of a mask is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers_models as models
from helpers import named
from mra_attention import MRAConfig
from mra_attention.integrations.transformers import masks, patterns, register
from torch import Tensor
from transformers import AttentionInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers_models import EXACT, LENGTH, SMALL, build, error, padding, tokens

WINDOW = 5
DOCUMENTS = torch.tensor([[0] * 4 + [1] * 5 + [2] * 3, [0] * 12])
WITHIN = torch.tensor([[*range(4), *range(5), *range(3)], [*range(12)]])


def packed(function: Any) -> Any:
    remapped = masking_utils.remap_positions_for_packed_sequence(function, WITHIN)
    return masking_utils.and_masks(remapped, masking_utils.packed_sequence_mask_function(DOCUMENTS))


CAUSAL, BIDIRECTIONAL = masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function
KNOWN = {
    "causal": (CAUSAL, (True, (-1, -1), False)),
    "bidirectional": (BIDIRECTIONAL, (False, (-1, -1), False)),
    "window": (masking_utils.sliding_window_causal_mask_function(WINDOW), (True, (WINDOW - 1, 0), False)),
    "both sides": (
        masking_utils.sliding_window_bidirectional_mask_function(WINDOW),
        (False, (WINDOW, WINDOW), False),
    ),
    "packed": (packed(CAUSAL), (True, (-1, -1), True)),
    "packed window": (
        packed(masking_utils.sliding_window_causal_mask_function(WINDOW)),
        (True, (WINDOW - 1, 0), True),
    ),
}


def arbitrary(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (key <= query) & (key % 3 != 1)


UNKNOWN = {
    "arbitrary": arbitrary,
    "causal or arbitrary": masking_utils.or_masks(CAUSAL, arbitrary),
    "causal and arbitrary": masking_utils.and_masks(arbitrary, CAUSAL),
    "three": masking_utils.and_masks(masking_utils.sliding_window_overlay(3), CAUSAL, arbitrary),
    "chunks": masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)),
    "packed arbitrary": packed(arbitrary),
    "window or image": masking_utils.or_masks(
        masking_utils.sliding_window_causal_mask_function(WINDOW),
        masking_utils.blockwise_overlay(torch.tensor([[-1] * 4 + [0] * 8] * 2)),
    ),
    "another window": masking_utils.and_masks(masking_utils.sliding_window_bidirectional_overlay(3), CAUSAL),
}


def mask_of(function: Any, queries: int = 12, keys: int = 12, **options: Any) -> Any:
    return masks.mra_mask(2, queries, keys, mask_function=function, device="cpu", **options)


def pairs_of(function: Any, queries: int = 12, keys: int = 12, **options: Any) -> Tensor:
    given = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, **options}
    return masking_utils.sdpa_mask(2, queries, keys, mask_function=function, **given)


@pytest.mark.parametrize("name", KNOWN)
def test_known_mask_functions_are_described(name: str):
    function, (is_causal, window_size, is_packed) = KNOWN[name]
    mask = mask_of(function)
    assert isinstance(mask, masks.PatternMask)
    assert mask.pattern[:2] == (is_causal, window_size)
    assert (mask.pattern.documents is not None) == is_packed
    assert (mask.shape, mask.dtype, mask.padding) == ((2, 1, 12, 12), torch.bool, None)


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_mask_functions_get_the_mask_of_pairs(name: str):
    mask = mask_of(UNKNOWN[name])
    assert type(mask) is Tensor
    assert torch.equal(mask, pairs_of(UNKNOWN[name]))


@pytest.mark.parametrize("name", KNOWN)
def test_operations_see_the_elements(name: str):
    function, _ = KNOWN[name]
    given = torch.ones(2, 12, dtype=torch.bool)
    given[0, :3] = False
    mask, expected = mask_of(function, attention_mask=given), pairs_of(function, attention_mask=given)
    for operation in (
        lambda x: x[:, :, 2:, :7],
        lambda x: x & torch.ones(12, 12, dtype=torch.bool).tril(),
        lambda x: torch.where(x, 0.0, -torch.inf),
        lambda x: torch.cat([x, x], -1),
        lambda x: x.float(),
    ):
        result = operation(mask)
        assert type(result) is Tensor
        assert torch.equal(result, operation(expected))
    assert "PatternMask(shape=(2, 1, 12, 12)" in repr(mask)


def test_a_mask_stays_a_description_where_models_only_pass_it_on():
    mask = mask_of(CAUSAL, attention_mask=torch.tensor([[False] * 3 + [True] * 9, [True] * 12]))
    for same in (mask.contiguous(), mask.to("cpu"), mask.to(torch.bool), mask.detach()):
        assert isinstance(same, masks.PatternMask)
        assert same.pattern == mask.pattern
        assert same.padding is not None
        assert torch.equal(same.padding, mask.padding)


def test_keys_that_a_static_cache_has_not_written_are_left_out():
    seen = torch.ones(2, 9, dtype=torch.bool)
    seen[0, :2] = False
    offset = torch.tensor(7)
    mask = mask_of(CAUSAL, 2, 32, q_offset=offset, attention_mask=seen)
    offset += 5  # as the cache does, which hands out its own counter
    assert mask.keys == 9
    assert torch.equal(mask.padding, seen)
    assert torch.equal(mask.elements()[..., :9], pairs_of(CAUSAL, 2, 9, q_offset=7, attention_mask=seen))
    assert not mask.elements()[..., 9:].any()


def test_keys_of_a_sliding_cache_begin_behind_the_first_token():
    seen = torch.ones(2, 21, dtype=torch.bool)
    seen[0, :18] = False
    mask = mask_of(KNOWN["window"][0], 1, 5, q_offset=20, kv_offset=16, attention_mask=seen)
    assert mask.keys == 5
    assert torch.equal(mask.padding, seen[:, 16:])


def test_no_mask_of_pairs_is_made_where_the_pattern_is_known(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a mask of pairs")

    of_packed = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)])[None].expand(2, -1)
    for name in ("bert", "modernbert", "llama", "mistral", "gemma3"):
        model = build(name, SMALL)
        with monkeypatch.context() as patch, named(name), torch.no_grad():
            patch.setattr(masking_utils, "sdpa_mask", refuse)
            for side in ("none", "left", "right"):
                model(tokens(), attention_mask=padding(side))
            if name in models.DECODERS:
                model(tokens(), position_ids=of_packed, use_cache=False)
                for cache in ("dynamic", "static"):
                    options = {"do_sample": False, "max_new_tokens": 3, "cache_implementation": cache}
                    model.generate(tokens(), attention_mask=padding("left"), **options)


def test_a_model_with_a_mask_function_of_its_own_gets_what_torch_gives(monkeypatch: pytest.MonkeyPatch):
    model = build("llama", EXACT)
    ids, create = tokens(), masking_utils.create_causal_mask
    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.create_causal_mask",
        lambda **given: create(**given, or_mask_function=lambda b, h, q, k: (q < 9) & (k < 9)),
    )
    result = model(ids, attention_mask=padding("right")).logits
    with models.reference("llama", model):
        expected = model(ids, attention_mask=padding("right")).logits
    assert error(result, expected) <= 1e-5


def test_masks_that_do_not_fit_are_refused():
    attention = attention_function()
    query = torch.randn(2, 4, 12, 8)
    with pytest.raises(ValueError, match=r"is for .* = \(12, 12\), but query and key have \(12, 9\)"):
        attention(query, query[:, :, :9], query[:, :, :9], mask_of(CAUSAL))
    with pytest.raises(NotImplementedError, match="sliding_window=4 with attention_mask=None"):
        attention(query, query, query, None, sliding_window=4)


def test_without_a_mask_the_rules_are_those_of_torch():
    """Models that ask for no mask: torch's own function decides by `is_causal`, the lengths and the layer."""
    query, key = torch.randn(2, 4, 12, 8, dtype=torch.float64), torch.randn(2, 4, 20, 8, dtype=torch.float64)
    cases: list[tuple[Tensor, Tensor, dict[str, Any]]] = [
        (query, query, {}),
        (query, query, {"is_causal": False}),
        (query, key, {"is_causal": False}),
        (query, key, {"is_causal": True}),
        (query[:, :, :1], key, {"is_causal": True}),
        (query, query, {"is_causal": True, "sliding_window": 20}),
    ]
    attention = attention_function()
    for q, k, options in cases:
        expected, _ = sdpa_attention_forward(module(), q, k, k, None, scaling=0.3, **options)
        result, weights = attention(q, k, k, None, scaling=0.3, **options)
        with named((q.shape, k.shape, options)):
            assert weights is None
            assert error(result, expected) <= 1e-10


def module() -> torch.nn.Module:
    layer = torch.nn.Module().eval()
    layer.is_causal = True
    return layer


def attention_function() -> Any:
    register(MRAConfig.from_dict(EXACT))
    return lambda *given, **options: AttentionInterface()["mra"](module(), *given, **options)


def test_a_layer_that_is_told_not_causal_with_a_causal_mask_goes_by_the_mask():
    """Some models pass `is_causal=False` because there is a mask."""
    attention, query = attention_function(), torch.randn(2, 4, 12, 8)
    expected, _ = attention(query, query, query, mask_of(CAUSAL))
    assert torch.equal(attention(query, query, query, mask_of(CAUSAL), is_causal=False)[0], expected)


def test_recognition_looks_at_code_and_not_at_names():
    def and_mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return mask_functions[0](batch, head, query, key)

    mask_functions = (masking_utils.sliding_window_overlay(3), CAUSAL)
    and_mask.__qualname__ = KNOWN["window"][0].__qualname__
    assert patterns.recognise(and_mask) is None
