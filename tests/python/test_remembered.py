"""What a call remembers of the settings of earlier ones never shows, and plain calls do what the operator does."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers import named
from mra_attention import MRAConfig, scaled_dot_product_attention
from mra_attention._ops import is_plain
from mra_attention.integrations.sdpa import replace_sdpa

QUERY, KEY, VALUE = torch.randn(3, 1, 2, 300, 8, generator=torch.Generator().manual_seed(0)).unbind()

# What is accepted, and what compares equal to it and is not.
EQUALS = {
    "blocks_per_row": (1, True),
    "num_blocks": (2, 2.0),
    "resolutions": ((32, 1), (32, True)),
    "resolutions of floats": ((32, 1), (32.0, 1)),
    "diagonal_blocks": (0, False),
    "pool_queries": (True, 1),
    "coarse_shift": (0, False),
    "window_size": ((-1, 1), (-1, True)),
    "scale": (1, True),
    "dropout_p": (0.0, 0j),
}


def attention(**arguments):
    return scaled_dot_product_attention(QUERY, KEY, VALUE, **arguments)


def test_what_compares_equal_to_an_accepted_value_is_refused_all_the_same():
    for case, (accepted, refused) in EQUALS.items():
        name = case.partition(" ")[0]
        for config in ({}, {"config": MRAConfig(blocks_per_row=2.0)}):
            with named(case):
                assert accepted == refused
                attention(**config, **{name: accepted})
                texts = []
                for _ in range(3):
                    with pytest.raises(TypeError, match=name) as raised:
                        attention(**config, **{name: refused})
                    texts.append(str(raised.value))
                assert len(set(texts)) == 1
                attention(**config, **{name: accepted})


def test_a_wrong_setting_is_refused_by_every_call():
    for settings, words in (
        ({"blocks_per_row": 0}, "positive"),
        ({"blocks_per_row": (1.0, 2.0, 3.0)}, "2 heads"),
        ({"mode": "dense"}, "dense"),
        ({"config": []}, "config"),
        ({"blocks": 4}, "no setting"),
    ):
        for _ in range(3):
            with pytest.raises((TypeError, ValueError), match=words):
                attention(**settings)


def test_settings_in_turns_have_each_its_own_result():
    cases = [
        {},
        {"blocks_per_row": 1},
        {"config": MRAConfig(blocks_per_row=1)},
        {"blocks_per_row": 1, "mode": "sparse"},
        {"config": MRAConfig(blocks_per_row=1), "mode": "sparse"},
        {"blocks_per_row": (1.0, 8.0)},
        {"scale": 1.0},
        {"is_causal": True},
        {"window_size": (40, 0)},
        {"softcap": 1.0},
    ]
    first = [attention(**case) for case in cases]
    for case, result in zip(cases, first, strict=True):
        with named(str(case)):
            assert torch.equal(attention(**case), result)
    for one in range(len(cases)):
        for other in range(one):
            same = (one, other) in ((2, 1), (4, 3))
            assert torch.equal(first[one], first[other]) == same, (cases[one], cases[other])


def test_the_defaults_of_replaced_calls_do_not_go_stale():
    call = torch.nn.functional.scaled_dot_product_attention
    for rate in (1, 2, 1):
        with replace_sdpa(blocks_per_row=rate):
            assert torch.equal(call(QUERY, KEY, VALUE), attention(blocks_per_row=rate))


def test_a_tensor_among_the_settings_is_read_anew_and_not_kept():
    rates = torch.tensor([1.0, 1.0])
    before = attention(blocks_per_row=rates)
    rates.fill_(8.0)
    assert torch.equal(attention(blocks_per_row=rates), attention(blocks_per_row=8))
    assert not torch.equal(before, attention(blocks_per_row=8))
    scale = torch.tensor(0.5)
    attention(scale=scale)
    gone = [weakref.ref(rates), weakref.ref(scale)]
    del rates, scale
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_tensors_of_inference_mode_have_the_same_result():
    expected = attention()
    with torch.inference_mode():
        query, key, value = (tensor.clone() for tensor in (QUERY, KEY, VALUE))
        assert is_plain(query, key, value)
        inside = scaled_dot_product_attention(query, key, value)
    outside = scaled_dot_product_attention(query, key, value)
    assert torch.equal(inside, expected)
    assert torch.equal(outside, expected)
    assert (inside.is_inference(), outside.is_inference()) == (True, False)


def test_the_output_has_strides_of_its_own_where_a_dimension_has_one_element():
    query = torch.empty_strided((1, 1, 32, 8), (7, 5, 8, 1)).copy_(QUERY[:, :1, :32])
    out = scaled_dot_product_attention(query, KEY[:, :1], VALUE[:, :1])
    assert out.stride() == (256, 256, 8, 1)
