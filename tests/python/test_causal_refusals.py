"""What causal attention refuses, and with which words."""

from __future__ import annotations

from typing import Any

import mra_attention
import pytest
import torch
from mra_attention import CausalPlan, plan, scaled_dot_product_attention
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

# torch warns that queries before the first key see nothing, which is what some of these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:Lower right causal bias:UserWarning")

QUERY, KEY = torch.randn(2, 4, 40, 16), torch.randn(2, 4, 48, 16)
FIT = CausalPlan(torch.zeros(2, 4, 40, 2, dtype=torch.int32), 48, 32, 0)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "mask": (
        {"attn_mask": torch.ones(2, 1, 1, 48, dtype=torch.bool)},
        ValueError,
        "is_causal=True .* attn_mask.*varlen",
    ),
    "bias": ({"attn_mask": causal_upper_left(40, 48)}, ValueError, "is_causal=True .* CausalBias"),
    "bias of other lengths": (
        {"is_causal": False, "attn_mask": causal_upper_left(40, 47)},
        ValueError,
        r"attn_mask is a CausalBias .* \(40, 47\).* \(40, 48\)",
    ),
    "num_blocks": ({"num_blocks": 3}, ValueError, "num_blocks=3 cannot .* blocks_per_row"),
    "diagonal": ({"diagonal_blocks": 3}, ValueError, "diagonal_blocks=3 cannot .* local_blocks"),
    "query mask": (
        {"query_padding_mask": torch.ones(2, 40, dtype=torch.bool)},
        ValueError,
        "query_padding_mask=a mask cannot .* leave it out",
    ),
    "num_blocks with a bias": (
        {"is_causal": False, "attn_mask": causal_upper_left(40, 48), "num_blocks": 3},
        ValueError,
        "num_blocks=3 cannot .* blocks_per_row",
    ),
    "local 0": ({"local_blocks": 0}, ValueError, "local_blocks must be an integer of at least 1 .* 0"),
    "local float": ({"local_blocks": 1.0}, TypeError, "local_blocks must be an integer of at least 1, got 1.0"),
    "local without causal": (
        {"is_causal": False, "local_blocks": 2},
        ValueError,
        "local_blocks=2 is for causal attention only .* diagonal_blocks",
    ),
    "is_causal int": ({"is_causal": 1}, TypeError, "is_causal must be True or False, got 1"),
    "is_causal none": ({"is_causal": None}, TypeError, "is_causal must be True or False, got None"),
    "resolutions": ({"resolutions": (64, 8, 1)}, NotImplementedError, "more than two resolutions"),
}
PLAN_REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "tensor": ({"plan": torch.zeros(2)}, TypeError, "plan must be None or a mra_attention.CausalPlan .* Tensor"),
    "not causal": (
        {"plan": plan(QUERY, KEY)},
        TypeError,
        "plan must be None or a mra_attention.CausalPlan in causal attention, got Plan",
    ),
    "causal": (
        {"is_causal": False, "plan": FIT},
        TypeError,
        "plan must be None or a mra_attention.Plan, got CausalPlan",
    ),
    "block size": ({"plan": FIT, "resolutions": (16, 1)}, ValueError, r"block_size=32.*16.*\(32, 1\)"),
    "offset": (
        {"is_causal": False, "attn_mask": causal_lower_right(40, 48), "plan": FIT},
        ValueError,
        r"plan was made for other inputs.*\(2, 4, 40, 48, 0\) in the plan and \(2, 4, 40, 48, 8\)",
    ),
    "budget": (
        {"plan": FIT, "blocks_per_row": 2.0},
        ValueError,
        "blocks_per_row=2.0 cannot be used together with plan",
    ),
    "local": ({"plan": FIT, "local_blocks": 2}, ValueError, "local_blocks=2 cannot be used together with plan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    arguments, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        scaled_dot_product_attention(QUERY, KEY, KEY, **({"is_causal": True} | arguments))
    with pytest.raises(error, match=words):
        plan(QUERY, KEY, **({"is_causal": True} | arguments))


@pytest.mark.parametrize("name", PLAN_REFUSED)
def test_refuses_a_plan(name):
    arguments, error, words = PLAN_REFUSED[name]
    with pytest.raises(error, match=words):
        scaled_dot_product_attention(QUERY, KEY, KEY, **({"is_causal": True} | arguments))


def int32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"blocks": [0]}, TypeError, "blocks must be a torch.int32 tensor, got list"),
        ({"blocks": int32(2, 4, 40, 2).long()}, TypeError, "blocks must be a torch.int32 tensor, got a torch.int64"),
        ({"blocks": int32(2, 4, 40)}, ValueError, r"blocks must have the shape \(B, H, Lq, W\) with W from 1 to 2"),
        ({"blocks": int32(2, 4, 40, 0)}, ValueError, "W from 1 to 2"),
        ({"blocks": int32(2, 4, 40, 3)}, ValueError, "W from 1 to 2"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1 .* block_size=0"),
        ({"key_length": -1}, ValueError, "key_length at least 0, .* key_length=-1"),
    ],
)
def test_causal_plan_values_are_checked(arguments, error, words):
    with pytest.raises(error, match=words):
        CausalPlan(**({"blocks": int32(2, 4, 40, 2), "key_length": 48, "block_size": 32, "offset": 0} | arguments))


def test_the_class_is_public():
    assert mra_attention.CausalPlan is CausalPlan
