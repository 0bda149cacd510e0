"""Every argument that is refused: the error, and that its message names argument, value and what is accepted."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from mra_attention import MRAConfig, Plan, can_run, plan, scaled_dot_product_attention
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

BATCH, HEADS, QUERY_LENGTH, KEY_LENGTH, HEAD_DIM = 2, 4, 40, 48, 16


def inputs() -> dict[str, Any]:
    return {
        "query": torch.randn(BATCH, HEADS, QUERY_LENGTH, HEAD_DIM),
        "key": torch.randn(BATCH, HEADS, KEY_LENGTH, HEAD_DIM),
        "value": torch.randn(BATCH, HEADS, KEY_LENGTH, HEAD_DIM),
    }


def call(function: Any, arguments: dict[str, Any]) -> Any:
    """Call with the arguments on top of valid inputs; an argument that `plan` does not have is left out."""
    given = inputs() | arguments
    if function is plan:
        given = {name: value for name, value in given.items() if name not in ONLY_ATTENTION}
    return function(**given)


def nested(layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype, says torch
        return torch.nested.nested_tensor([torch.randn(9, 4, 16), torch.randn(7, 4, 16)], layout=layout)


def boolean(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def planned(**arguments: Any) -> Plan:
    """A plan for the inputs, or for others that are given."""
    return plan(**({name: value for name, value in inputs().items() if name != "value"} | arguments))


FIT = planned()


def block_mask(batch: int, heads: int, query_length: int, key_length: int) -> BlockMask:
    sizes = (batch, heads, query_length, key_length)
    return create_block_mask(lambda b, h, i, j: i >= j, *sizes, device="cpu", BLOCK_SIZE=16)


# name: (arguments, error, words of the message in their order)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    # Tensors
    "query-list": ({"query": [1.0]}, TypeError, ["query must be a torch.Tensor", "list"]),
    "query-none": ({"query": None}, TypeError, ["query must be a torch.Tensor", "NoneType"]),
    "key-numpy": ({"key": np.zeros((2, 4, 48, 16))}, TypeError, ["key must be a torch.Tensor", "ndarray"]),
    "value-none": ({"value": None}, TypeError, ["value must be a torch.Tensor", "NoneType"]),
    "query-int": ({"query": torch.ones(2, 4, 40, 16, dtype=torch.int64)}, TypeError, ["query", "float32", "int64"]),
    "all-int": (
        {name: torch.ones(2, 4, 40, 16, dtype=torch.int32) for name in ("query", "key", "value")},
        TypeError,
        ["query must be a float32, float64, bfloat16 or float16 tensor", "torch.int32"],
    ),
    "key-bool": ({"key": boolean(2, 4, 48, 16)}, TypeError, ["key", "float32", "torch.bool"]),
    "value-complex": (
        {"value": torch.zeros(2, 4, 48, 16, dtype=torch.complex64).conj()},
        TypeError,
        ["value", "float32", "torch.complex64"],
    ),
    "query-float8": (
        {"query": torch.zeros(2, 4, 40, 16, dtype=torch.float8_e4m3fn)},
        TypeError,
        ["query", "float32", "torch.float8_e4m3fn"],
    ),
    "dtypes": (
        {"key": torch.randn(2, 4, 48, 16, dtype=torch.float64)},
        TypeError,
        ["same dtype", "torch.float32, torch.float64", "autocast"],
    ),
    "mask-nested": (
        {"attn_mask": nested(torch.jagged)},
        NotImplementedError,
        ["attn_mask is a nested tensor", "only query, key and value"],
    ),
    "query-sparse": (
        {"query": torch.zeros(2, 4, 40, 16).to_sparse()},
        TypeError,
        ["query must be a dense (torch.strided) tensor", "torch.sparse_coo"],
    ),
    "all-meta": (
        {name: torch.empty(2, 4, 40, 16, device="meta") for name in ("query", "key", "value")},
        NotImplementedError,
        ["query", "meta", "only cpu", "later"],
    ),
    "devices": ({"key": torch.empty(2, 4, 48, 16, device="meta")}, ValueError, ["same device", "cpu, meta"]),
    # Shapes
    "query-1d": ({"query": torch.randn(16)}, ValueError, ["query must have at least two dimensions", "(16,)"]),
    "key-0d": ({"key": torch.tensor(1.0)}, ValueError, ["key must have at least two dimensions", "()"]),
    "head-dim": (
        {"key": torch.randn(2, 4, 48, 8)},
        ValueError,
        ["query and key must have the same head_dim", "16 in query (2, 4, 40, 16)", "8 in key (2, 4, 48, 8)"],
    ),
    "lengths": (
        {"value": torch.randn(2, 4, 47, 16)},
        ValueError,
        ["key and value must have the same length", "48 in key (2, 4, 48, 16)", "47 in value (2, 4, 47, 16)"],
    ),
    "batch": (
        {"query": torch.randn(3, 4, 40, 16)},
        ValueError,
        ["batch dimensions must be equal or 1", "query (3, 4, 40, 16), key (2, 4, 48, 16)"],
    ),
    "heads": (
        {"key": torch.randn(2, 3, 48, 16), "value": torch.randn(2, 3, 48, 16)},
        ValueError,
        ["numbers of heads", "equal or 1", "query (2, 4, 40, 16), key (2, 3, 48, 16)"],
    ),
    "heads-gqa-hint": (
        {"key": torch.randn(2, 2, 48, 16), "value": torch.randn(2, 2, 48, 16)},
        ValueError,
        ["numbers of heads", "enable_gqa=True would group them", "key (2, 2, 48, 16)"],
    ),
    "gqa-indivisible": (
        {"key": torch.randn(2, 3, 48, 16), "value": torch.randn(2, 3, 48, 16), "enable_gqa": True},
        ValueError,
        ["enable_gqa=True", "divide query's", "query (2, 4, 40, 16), key (2, 3, 48, 16)"],
    ),
    # attn_mask
    "mask-list": ({"attn_mask": [True]}, TypeError, ["attn_mask must be a torch.Tensor", "list"]),
    "mask-int": (
        {"attn_mask": torch.ones(2, 1, 1, 48, dtype=torch.int64)},
        TypeError,
        ["attn_mask must be a bool tensor", "torch.int64"],
    ),
    "mask-double": (
        {"attn_mask": torch.zeros(2, 1, 40, 48, dtype=torch.float64)},
        TypeError,
        [
            "attn_mask must be a bool tensor",
            "additive bias of float32",
            "dtype of query, torch.float32",
            "torch.float64",
        ],
    ),
    "mask-wrong-length": (
        {"attn_mask": boolean(2, 1, 1, 47)},
        ValueError,
        ["attn_mask must be broadcastable", "(2, 4, 40, 48)", "(2, 1, 1, 47)"],
    ),
    "mask-wrong-batch": (
        {"attn_mask": boolean(3, 1, 1, 48)},
        ValueError,
        ["attn_mask must be broadcastable", "(2, 4, 40, 48)", "(3, 1, 1, 48)"],
    ),
    "mask-5d": (
        {"attn_mask": boolean(1, 2, 1, 1, 48)},
        ValueError,
        ["attn_mask", "(2, 4, 40, 48)", "(1, 2, 1, 1, 48)"],
    ),
    "mask-0d": ({"attn_mask": torch.tensor(True)}, ValueError, ["attn_mask", "(2, 4, 40, 48)", "()"]),
    "mask-batch-key": (
        {"attn_mask": boolean(2, 48)},
        ValueError,
        ["attn_mask must be broadcastable", "(2, 4, 40, 48)", "(2, 48)", "mask[:, None, None, :]"],
    ),
    "mask-sparse": ({"attn_mask": boolean(2, 1, 1, 48).to_sparse()}, TypeError, ["attn_mask", "dense", "sparse_coo"]),
    "mask-meta": ({"attn_mask": boolean(2, 1, 1, 48).to("meta")}, NotImplementedError, ["attn_mask", "meta", "cpu"]),
    "mask-causal-bias": (
        {"attn_mask": causal_upper_left(40, 48), "is_causal": True},
        ValueError,
        ["is_causal=True cannot be used together with an attn_mask that is a CausalBias"],
    ),
    "mask-causal-bias-lengths": (
        {"attn_mask": causal_upper_left(40, 47)},
        ValueError,
        ["attn_mask is a CausalBias", "(40, 47)", "(40, 48)"],
    ),
    "mask-causal-bias-lost": (
        {"attn_mask": causal_upper_left(40, 48).clone()},
        TypeError,
        ["attn_mask is a CausalBias that has lost its lengths"],
    ),
    "block-mask-lengths": (
        {"attn_mask": block_mask(1, 1, 40, 47)},
        ValueError,
        ["attn_mask is a BlockMask", "(40, 47)", "(40, 48)"],
    ),
    "block-mask-heads": (
        {"attn_mask": block_mask(2, 3, 40, 48)},
        ValueError,
        ["attn_mask is a BlockMask for (batch, heads) = (2, 3)", "(2, 4)"],
    ),
    # query_padding_mask
    "query-mask-list": (
        {"query_padding_mask": [True]},
        TypeError,
        ["query_padding_mask must be a torch.Tensor", "list"],
    ),
    "query-mask-float": (
        {"query_padding_mask": torch.ones(2, 40)},
        TypeError,
        ["query_padding_mask must be a bool tensor", "torch.float32"],
    ),
    "query-mask-length": (
        {"query_padding_mask": boolean(2, 39)},
        ValueError,
        ["query_padding_mask must be broadcastable", "(2, 40)", "(2, 39)"],
    ),
    "query-mask-batch": (
        {"query_padding_mask": boolean(3, 40)},
        ValueError,
        ["query_padding_mask", "(2, 40)", "(3, 40)"],
    ),
    "query-mask-one": ({"query_padding_mask": boolean(2, 1)}, ValueError, ["query_padding_mask", "(2, 40)", "(2, 1)"]),
    "query-mask-4d": (
        {"query_padding_mask": boolean(2, 1, 1, 40)},
        ValueError,
        ["query_padding_mask", "(2, 40)", "(2, 1, 1, 40)"],
    ),
    "query-mask-meta": (
        {"query_padding_mask": boolean(2, 40).to("meta")},
        NotImplementedError,
        ["query_padding_mask", "meta", "cpu"],
    ),
    # Switches
    "causal-int": ({"is_causal": 1}, TypeError, ["is_causal must be True or False", "1"]),
    "causal-none": ({"is_causal": None}, TypeError, ["is_causal must be True or False", "None"]),
    "gqa-string": ({"enable_gqa": "yes"}, TypeError, ["enable_gqa must be True or False", "'yes'"]),
    "return-lse-int": ({"return_lse": 1}, TypeError, ["return_lse must be True or False", "1"]),
    "mode-unknown": ({"mode": "dense"}, ValueError, ["mode must be 'full' or 'sparse'", "'dense'"]),
    "coarse-unknown": ({"coarse": "exact"}, ValueError, ["coarse must be 'mean' or 'first_order'", "'exact'"]),
    "coarse-none": ({"coarse": None}, TypeError, ["coarse must be the string 'mean' or 'first_order'", "None"]),
    "coarse-softcap": (
        {"coarse": "first_order", "softcap": 5.0},
        NotImplementedError,
        ["coarse='first_order'", "softcap", "coarse='mean'"],
    ),
    "coarse-gradient-of-bias": (
        {"coarse": "first_order", "attn_mask": torch.zeros(40, 48, requires_grad=True)},
        NotImplementedError,
        ["coarse='first_order'", "attn_mask that requires a gradient", "coarse='mean'"],
    ),
    "mode-none": ({"mode": None}, TypeError, ["mode must be the string 'full' or 'sparse'", "None"]),
    "dropout-negative": ({"dropout_p": -0.1}, ValueError, ["dropout_p must be a number in [0, 1]", "-0.1"]),
    "dropout-large": ({"dropout_p": 1.5}, ValueError, ["dropout_p must be a number in [0, 1]", "1.5"]),
    "dropout-nan": ({"dropout_p": math.nan}, ValueError, ["dropout_p must be a number in [0, 1]", "nan"]),
    "dropout-string": ({"dropout_p": "0"}, TypeError, ["dropout_p must be a number in [0, 1]", "'0'"]),
    "dropout-vector": ({"dropout_p": torch.zeros(1)}, TypeError, ["dropout_p must be a number in [0, 1]", "tensor"]),
    # Numbers
    "scale-nan": ({"scale": math.nan}, ValueError, ["scale must be None or a number", "nan"]),
    "scale-string": ({"scale": "1"}, TypeError, ["scale must be None or a number", "'1'"]),
    "scale-vector": ({"scale": torch.tensor([0.5])}, TypeError, ["scale must be None or a number", "tensor([0.5"]),
    "scale-gradient": (
        {"scale": torch.tensor(0.5, requires_grad=True)},
        TypeError,
        ["scale must be None or a number", "requires_grad=True"],
    ),
    "scale-bool": ({"scale": True}, TypeError, ["scale must be None or a number", "True"]),
    "window-int": ({"window_size": 5}, TypeError, ["window_size must be two integers (left, right)", "5"]),
    "window-three": ({"window_size": (1, 2, 3)}, TypeError, ["window_size must be two integers", "(1, 2, 3)"]),
    "window-below": ({"window_size": (-2, 0)}, ValueError, ["window_size[0] must be an integer of at least -1", "-2"]),
    "window-float": ({"window_size": (4, 0.5)}, TypeError, ["window_size[1] must be an integer of at least -1", "0.5"]),
    "rate-0": ({"blocks_per_row": 0.0}, ValueError, ["blocks_per_row must be a positive number", "0.0"]),
    "rate-negative": ({"blocks_per_row": -1}, ValueError, ["blocks_per_row must be a positive", "-1"]),
    "rate-nan": ({"blocks_per_row": math.nan}, ValueError, ["blocks_per_row must be a positive", "nan"]),
    "rates-none": ({"blocks_per_row": []}, ValueError, ["blocks_per_row must be a positive number, or one for each"]),
    "rates-zero": ({"blocks_per_row": [1, 2, 0, 4]}, ValueError, ["blocks_per_row[2] must be a positive number", "0"]),
    "rates-number": (
        {"blocks_per_row": [1, 2, 3]},
        ValueError,
        ["blocks_per_row must be one number, or one for each of the 4 heads of query", "3"],
    ),
    "rates-string": ({"blocks_per_row": "4"}, TypeError, ["blocks_per_row must be a positive number", "'4'"]),
    "rate-none": ({"blocks_per_row": None}, TypeError, ["blocks_per_row must be a positive number", "None"]),
    "rate-bool": ({"blocks_per_row": True}, TypeError, ["blocks_per_row must be a positive number", "True"]),
    "num-blocks-0": ({"num_blocks": 0}, ValueError, ["num_blocks must be an integer of at least 1", "0"]),
    "num-blocks-negative": ({"num_blocks": -3}, ValueError, ["num_blocks must be an integer of at least 1", "-3"]),
    "num-blocks-float": ({"num_blocks": 4.0}, TypeError, ["num_blocks must be an integer of at least 1", "4.0"]),
    "num-blocks-bool": ({"num_blocks": True}, TypeError, ["num_blocks must be an integer of at least 1", "True"]),
    "num-blocks-huge": (
        {"num_blocks": 2**63},
        ValueError,
        ["num_blocks must be an integer", "below 2**63", str(2**63)],
    ),
    "first-negative": ({"first_blocks": -1}, ValueError, ["first_blocks must be an integer of at least 0", "-1"]),
    "first-float": ({"first_blocks": 1.0}, TypeError, ["first_blocks must be an integer of at least 0", "1.0"]),
    "diagonal-negative": (
        {"diagonal_blocks": -1},
        ValueError,
        ["diagonal_blocks must be an integer of at least 0", "-1"],
    ),
    "score-other": ({"score": "min"}, ValueError, ["score must be 'mean' or 'max'", "'min'"]),
    "score-none": ({"score": None}, TypeError, ["score must be the string 'mean' or 'max'", "None"]),
    "shift-nan": ({"coarse_shift": math.nan}, ValueError, ["coarse_shift must be a finite number", "nan"]),
    "shift-inf": ({"coarse_shift": -math.inf}, ValueError, ["coarse_shift must be a finite number", "-inf"]),
    "shift-string": ({"coarse_shift": "1"}, TypeError, ["coarse_shift must be a finite number", "'1'"]),
    "local-0": ({"local_blocks": 0}, ValueError, ["local_blocks must be an integer of at least 1", "0"]),
    "local-float": ({"local_blocks": 1.0}, TypeError, ["local_blocks must be an integer of at least 1", "1.0"]),
    "grid-int": ({"grid": 4}, TypeError, ["grid must be None or two integers (rows, columns)", "got 4"]),
    "grid-three": ({"grid": (2, 3, 4)}, TypeError, ["grid must be None or two integers", "(2, 3, 4)"]),
    "grid-float": ({"grid": (2.0, 3)}, TypeError, ["grid[0] must be an integer of at least 1", "2.0"]),
    "grid-0": ({"grid": (2, 0)}, ValueError, ["grid[1] must be an integer of at least 1", "0"]),
    "pool-int": ({"pool_queries": 1}, TypeError, ["pool_queries must be True or False", "1"]),
    "config-dict": (
        {"config": {"mode": "full"}},
        TypeError,
        ["config must be None or a mra_attention.MRAConfig", "dict"],
    ),
    "unknown": ({"block_per_row": 2}, TypeError, ["'block_per_row' is no argument and no setting", "blocks_per_row"]),
    "diagonal-none": (
        {"diagonal_blocks": None},
        TypeError,
        ["diagonal_blocks must be an integer of at least 0", "None"],
    ),
    # resolutions
    "resolutions-int": (
        {"resolutions": 32},
        TypeError,
        ["resolutions must be a tuple of integers", "(32, 1)", "got 32"],
    ),
    "resolutions-string": ({"resolutions": "ab"}, TypeError, ["resolutions must be a tuple of integers", "'ab'"]),
    "resolutions-floats": ({"resolutions": (32.0, 1)}, TypeError, ["resolutions", "integers", "(32.0, 1)"]),
    "resolutions-bool": ({"resolutions": (32, True)}, TypeError, ["resolutions", "integers", "(32, True)"]),
    "resolutions-empty": ({"resolutions": ()}, ValueError, ["resolutions must end in 1", "(32, 1)", "got ()"]),
    "resolutions-one": ({"resolutions": (1,)}, ValueError, ["resolutions must end in 1", "two entries", "got (1,)"]),
    "resolutions-end": ({"resolutions": (32, 2)}, ValueError, ["resolutions must end in 1", "got (32, 2)"]),
    "resolutions-small": ({"resolutions": (3, 1)}, ValueError, ["resolutions", "from 4 to 128", "got (3, 1)"]),
    "resolutions-large": ({"resolutions": (256, 1)}, ValueError, ["resolutions", "a 128th", "(256, 1)"]),
    "resolutions-finest": ({"resolutions": (64, 2, 1)}, ValueError, ["resolutions", "from 4 to 128", "(64, 2, 1)"]),
    "resolutions-far": ({"resolutions": (8192, 32, 1)}, ValueError, ["a 128th", "32 does not follow 8192"]),
    "resolutions-negative": ({"resolutions": (-32, 1)}, ValueError, ["resolutions must decrease", "(-32, 1)"]),
    "resolutions-rising": (
        {"resolutions": (8, 32, 1)},
        ValueError,
        ["resolutions must decrease", "32 does not follow 8"],
    ),
    "resolutions-indivisible": (
        {"resolutions": (48, 32, 1)},
        ValueError,
        ["resolutions must decrease, each dividing", "32 does not follow 48", "(48, 32, 1)"],
    ),
    "ladder-num-blocks": (
        {"resolutions": (64, 16, 1), "num_blocks": 3},
        ValueError,
        ["num_blocks=3 is for two resolutions", "(64, 16, 1)", "blocks_per_row"],
    ),
    "ladder-budgets": (
        {"resolutions": (64, 16, 1), "blocks_per_row": (1, 2, 3)},
        ValueError,
        ["blocks_per_row must be one number, or one for each of the 2 levels", "got 3"],
    ),
    "ladder-heads": (
        {"resolutions": (64, 16, 1), "blocks_per_row": (1, (1, 2))},
        ValueError,
        ["blocks_per_row must be one number, or one for each of the 4 heads", "got 2"],
    ),
    # plan
    "plan-tensor": ({"plan": torch.zeros(2)}, TypeError, ["plan must be None or a mra_attention.Plan", "Tensor"]),
    "plan-batch": (
        {"plan": planned(query=torch.randn(3, 4, 40, 16), key=torch.randn(3, 4, 48, 16))},
        ValueError,
        ["plan was made for other inputs", "(3, 4, 40, 48) in the plan", "(2, 4, 40, 48)"],
    ),
    "plan-heads": (
        {"plan": planned(query=torch.randn(2, 1, 40, 16), key=torch.randn(2, 1, 48, 16))},
        ValueError,
        ["plan was made for other inputs", "(2, 1, 40, 48)"],
    ),
    "plan-query-length": ({"plan": planned(query=torch.randn(2, 4, 41, 16))}, ValueError, ["plan", "(2, 4, 41, 48)"]),
    "plan-key-length": ({"plan": planned(key=torch.randn(2, 4, 47, 16))}, ValueError, ["plan", "(2, 4, 40, 47)"]),
    "plan-block-size": (
        {"plan": planned(resolutions=(16, 1)), "resolutions": (32, 1)},
        ValueError,
        ["resolutions=(32, 1) does not fit plan", "made with resolutions=(16, 1)"],
    ),
    "plan-meta": (
        {"plan": dataclasses.replace(FIT, data=FIT.data.to("meta"))},
        NotImplementedError,
        ["plan.data", "meta", "cpu"],
    ),
    "plan-bool": (
        {"plan": dataclasses.replace(FIT, data=FIT.data.bool())},
        TypeError,
        ["plan.data must be a torch.uint8 tensor", "torch.bool"],
    ),
    "plan-short": ({"plan": dataclasses.replace(FIT, data=FIT.data[:, 1:])}, ValueError, ["plan"]),
    "plan-rate": (
        {"plan": FIT, "blocks_per_row": 2.0},
        ValueError,
        ["blocks_per_row=2.0 does not fit plan", "blocks_per_row=4.0", "mra_attention.plan"],
    ),
    "plan-config": (
        {"plan": FIT, "config": MRAConfig(blocks_per_row=2.0)},
        ValueError,
        ["blocks_per_row=2.0 does not fit plan", "blocks_per_row=4.0"],
    ),
    "plan-num-blocks": ({"plan": FIT, "num_blocks": 7}, ValueError, ["num_blocks=7 does not fit plan"]),
    "plan-first": ({"plan": FIT, "first_blocks": 1}, ValueError, ["first_blocks=1 does not fit plan"]),
    "plan-diagonal": ({"plan": FIT, "diagonal_blocks": 3}, ValueError, ["diagonal_blocks=3 does not fit plan"]),
    "plan-local": ({"plan": FIT, "local_blocks": 2}, ValueError, ["local_blocks=2 does not fit plan"]),
    "plan-score": ({"plan": FIT, "score": "mean"}, ValueError, ["score='mean' does not fit plan"]),
    "plan-pool": ({"plan": FIT, "pool_queries": False}, ValueError, ["pool_queries=False does not fit plan"]),
    "plan-causal": (
        {"plan": FIT, "is_causal": True},
        ValueError,
        ["plan was made for another is_causal or window_size", "(-1, -1, False)", "(-1, 0, False)"],
    ),
    "plan-not-causal": (
        {"plan": planned(is_causal=True)},
        ValueError,
        ["plan was made for another is_causal or window_size", "(-1, 0, False)", "(-1, -1, False)"],
    ),
    "plan-window": (
        {"plan": planned(window_size=(5, 6)), "window_size": (5, 7)},
        ValueError,
        ["plan was made for another is_causal or window_size", "(5, 6, False)", "(5, 7, False)"],
    ),
    "plan-aligned": (
        {"plan": planned(is_causal=True), "attn_mask": causal_lower_right(40, 48)},
        ValueError,
        ["plan was made for another is_causal or window_size", "(-1, 0, False)", "(-1, 0, True)"],
    ),
    "plan-mask": (
        {"plan": FIT, "attn_mask": boolean(40, 48)},
        ValueError,
        ["plan was made without an attn_mask of pairs", "used with one"],
    ),
    "plan-no-mask": (
        {"plan": planned(attn_mask=boolean(40, 48))},
        ValueError,
        ["plan was made with an attn_mask of pairs", "used without one"],
    ),
}

ONLY_ATTENTION = {"value", "dropout_p", "return_lse", "plan"}  # the arguments that `plan` does not have


def assert_refused(function: Any, name: str) -> None:
    arguments, error, words = REFUSED[name]
    with pytest.raises(error, match=".*".join(re.escape(word) for word in words)) as caught:
        call(function, arguments)
    assert type(caught.value) is error


@pytest.mark.parametrize("name", REFUSED)
def test_attention_refuses(name):
    assert_refused(scaled_dot_product_attention, name)


@pytest.mark.parametrize(
    "name", [name for name, (arguments, _, _) in REFUSED.items() if not ONLY_ATTENTION & arguments.keys()]
)
def test_plan_refuses(name):
    assert_refused(plan, name)


@pytest.mark.parametrize("name", REFUSED)
def test_can_run_returns_what_attention_raises(name):
    arguments, error, _ = REFUSED[name]
    given = inputs() | arguments
    if name == "plan-short":
        pytest.skip("only the native module looks at the size of a plan")
    with pytest.raises(error) as caught:
        scaled_dot_product_attention(**given)
    assert can_run(**given) == str(caught.value)


def test_can_run_returns_nothing_for_what_attention_takes():
    for arguments in ({}, {"is_causal": True}, {"plan": FIT}, {"window_size": (5, 0)}, {"dropout_p": 0.5}):
        assert can_run(**inputs(), **arguments) is None
    given, before = inputs(), torch.get_rng_state()
    assert can_run(**given, dropout_p=0.5) is None
    assert torch.equal(torch.get_rng_state(), before), "a check draws no seed"


# torch scripts functions of its own when forward mode is first used.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_can_run_looks_for_tangents():
    given = inputs()
    with forward_ad.dual_level():
        given["key"] = forward_ad.make_dual(given["key"], given["key"])
        assert "no forward-mode automatic differentiation" in str(can_run(**given))
