"""What looks unusual and is accepted: other spellings of arguments, layouts of masks, autocast."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_inputs
from mra_attention import plan, scaled_dot_product_attention
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

BATCH, HEADS, QUERY_LENGTH, KEY_LENGTH, HEAD_DIM = 2, 4, 40, 48, 16


def inputs() -> dict[str, Any]:
    return {
        "query": torch.randn(BATCH, HEADS, QUERY_LENGTH, HEAD_DIM),
        "key": torch.randn(BATCH, HEADS, KEY_LENGTH, HEAD_DIM),
        "value": torch.randn(BATCH, HEADS, KEY_LENGTH, HEAD_DIM),
    }


def boolean(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


ACCEPTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "resolutions-list": ({"resolutions": [16, 1]}, {"resolutions": (16, 1)}),
    "resolutions-numpy": ({"resolutions": (np.int64(16), np.int32(1))}, {"resolutions": (16, 1)}),
    "rate-int": ({"blocks_per_row": 2}, {"blocks_per_row": 2.0}),
    "rate-numpy": ({"blocks_per_row": np.float32(1.5)}, {"blocks_per_row": 1.5}),
    "rate-fraction": ({"blocks_per_row": Fraction(3, 2)}, {"blocks_per_row": 1.5}),
    "num-blocks-numpy": ({"num_blocks": np.int64(3)}, {"num_blocks": 3}),
    "scale-int": ({"scale": 1}, {"scale": 1.0}),
    "scale-default": ({"scale": HEAD_DIM**-0.5}, {}),
    "rate-tensor": ({"blocks_per_row": torch.tensor(2.0)}, {"blocks_per_row": 2.0}),
    "rates-equal": ({"blocks_per_row": [2.0] * HEADS}, {"blocks_per_row": 2.0}),
    "rates-tensor": ({"blocks_per_row": torch.tensor([1.0, 2, 3, 4])}, {"blocks_per_row": (1, 2, 3, 4)}),
    "rates-one": ({"blocks_per_row": [2]}, {"blocks_per_row": 2.0}),
    "scale-tensor": ({"scale": torch.tensor(0.5, dtype=torch.float64)}, {"scale": 0.5}),
    "dropout-int": ({"dropout_p": 0}, {}),
    "dropout-bool": ({"dropout_p": False}, {}),
    "dropout-tensor": ({"dropout_p": torch.tensor(0.0)}, {}),
    "window-list": ({"window_size": [5, 3]}, {"window_size": (5, 3)}),
    "window-wide": ({"window_size": (-1, -1)}, {}),
    "window-causal": ({"window_size": (-1, 0)}, {"is_causal": True}),
    "local-diagonal": ({"local_blocks": 2}, {"diagonal_blocks": 2}),
    "mask-1d": ({"attn_mask": boolean(48)}, {}),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_other_spellings_mean_the_same(name):
    unusual, usual = ACCEPTED[name]
    given = inputs()
    assert torch.equal(scaled_dot_product_attention(**given, **unusual), scaled_dot_product_attention(**given, **usual))


@pytest.mark.parametrize(
    "shape", ["(B,1,1,Lk)", "expanded over queries", "expanded over heads", "not contiguous", "from float"]
)
def test_spellings_of_a_key_mask(shape):
    given = inputs()
    mask = torch.rand(BATCH, KEY_LENGTH) > 0.4
    expected = scaled_dot_product_attention(**given, attn_mask=mask[:, None, None, :])
    spelled = {
        "(B,1,1,Lk)": mask.view(BATCH, 1, 1, KEY_LENGTH),
        "expanded over queries": mask[:, None, None, :].expand(BATCH, 1, QUERY_LENGTH, KEY_LENGTH),
        "expanded over heads": mask[:, None, None, :].expand(BATCH, HEADS, QUERY_LENGTH, KEY_LENGTH),
        "not contiguous": mask.t().contiguous().t()[:, None, None, :],
        "from float": mask.float().bool()[:, None, None, :],
    }[shape]
    assert torch.equal(scaled_dot_product_attention(**given, attn_mask=spelled), expected)
    assert torch.equal(
        plan(given["query"], given["key"], spelled).data,
        plan(given["query"], given["key"], mask[:, None, None, :]).data,
    )


def test_mask_of_one_value_for_all_keys_of_an_item():
    given = inputs()
    mask = torch.tensor([True, False]).view(2, 1, 1, 1)
    out, lse = scaled_dot_product_attention(**given, attn_mask=mask, return_lse=True)
    alone = scaled_dot_product_attention(**given, return_lse=True)
    assert torch.equal(out[0], alone[0][0])
    assert torch.equal(lse[0], alone[1][0])
    assert (out[1] == 0).all()
    assert (lse[1] == -math.inf).all()


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
def test_query_mask_has_the_batch_dimensions_of_the_inputs(lead):
    query, key, value = (torch.randn(*lead, 20, 8) for _ in range(3))
    mask = torch.rand(*lead[:-1], 20) > 0.5
    settings: dict[str, Any] = {"resolutions": (8, 1), "blocks_per_row": 1.0}
    out = scaled_dot_product_attention(query, key, value, query_padding_mask=mask, **settings)
    flat = [tensor.reshape(-1, lead[-1] if lead else 1, 20, 8) for tensor in (query, key, value)]
    expected = scaled_dot_product_attention(*flat, query_padding_mask=mask.reshape(-1, 20), **settings)
    assert torch.equal(out, expected.reshape(out.shape))
    assert (out[~mask.unsqueeze(-2).expand(out.shape[:-1])] == 0).all() if lead else (out[~mask] == 0).all()


def test_a_tensor_with_the_negative_bit_is_read_negated():
    given = inputs()
    negative = torch.randn(2, 4, 40, 16, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    out = scaled_dot_product_attention(**given | {"query": negative})
    assert torch.equal(out, scaled_dot_product_attention(**given | {"query": negative.clone().resolve_neg()}))


def test_parameters_are_tensors():
    given = inputs()
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in given.items()}
    assert torch.equal(scaled_dot_product_attention(**parameters), scaled_dot_product_attention(**given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_for_torch_attention(dtype):
    given = inputs()
    with torch.autocast("cpu", dtype=dtype):
        out = scaled_dot_product_attention(**given)
        selection = plan(given["query"], given["key"])
        theirs = torch.nn.functional.scaled_dot_product_attention(**given)
    cast = {name: tensor.to(dtype) for name, tensor in given.items()}
    assert out.dtype == theirs.dtype == dtype
    assert torch.equal(out, scaled_dot_product_attention(**cast))
    assert torch.equal(selection.data, plan(cast["query"], cast["key"]).data)


def test_autocast_leaves_float64_alone():
    given = {name: tensor.double() for name, tensor in inputs().items()}
    with torch.autocast("cpu"):
        assert scaled_dot_product_attention(**given).dtype == torch.float64


def test_autocast_makes_mixed_inputs_equal_and_passes_gradients_back():
    given = inputs()
    given["key"] = given["key"].bfloat16()
    given["query"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = scaled_dot_product_attention(**given)
    (grad,) = torch.autograd.grad(out.float().sum(), given["query"])
    assert grad.dtype == torch.float32
    assert grad.isfinite().all()
    assert grad.abs().max() > 0


def test_alignment_by_name_and_by_a_causal_bias() -> None:
    query, key, value, *_ = random_inputs((2, 2, 43, 51, 6))
    more = {"resolutions": (8, 1), "blocks_per_row": 2.0}
    by_bias = scaled_dot_product_attention(query, key, value, causal_lower_right(43, 51), **more)
    by_name = scaled_dot_product_attention(query, key, value, is_causal=True, causal_alignment="lower_right", **more)
    assert torch.equal(by_name, by_bias)
    both = scaled_dot_product_attention(
        query, key, value, causal_lower_right(43, 51), causal_alignment="lower_right", **more
    )
    assert torch.equal(both, by_bias)


def test_last_queries_have_the_bits_of_the_whole_with_holes_and_slopes() -> None:
    """Means of positions with holes are no numbers of float32; what they are counted from must not matter."""
    query, key, value, *_ = random_inputs((1, 2, 300, 300, 8), dtype=torch.float32)
    more = {"resolutions": (8, 1), "blocks_per_row": 2.0, "is_causal": True, "alibi_slopes": torch.tensor([0.3, 0.01])}
    for seed in range(5):
        valid = torch.rand(300, generator=torch.Generator().manual_seed(seed)) > 0.3
        mask = {"attn_mask": valid[None, None, None]}
        padding = {"query_padding_mask": torch.ones(1, 300, dtype=torch.bool)}
        whole = scaled_dot_product_attention(query, key, value, **mask, **padding, **more)
        for count in (5, 17):
            last = scaled_dot_product_attention(
                query[:, :, -count:], key, value, causal_alignment="lower_right", **mask, **more
            )
            assert torch.equal(last, whole[:, :, -count:])


def test_last_queries_of_padded_sequences_get_what_they_get_alone() -> None:
    """As in a decoder with a cache: few queries, and keys with padding in front, in a window too."""
    query, key, value, *_ = random_inputs((2, 2, 60, 60, 6))
    valid = torch.arange(60) >= torch.tensor([[0], [13]])
    for window in ((-1, -1), (20, -1)):
        more = {"resolutions": (8, 1), "blocks_per_row": 2.0, "is_causal": True, "window_size": window}
        mask = {"attn_mask": valid[:, None, None]}
        whole = scaled_dot_product_attention(query, key, value, **mask, **more)
        last = scaled_dot_product_attention(
            query[:, :, 55:], key, value, causal_alignment="lower_right", **mask, **more
        )
        assert torch.equal(last, whole[:, :, 55:])
        alone = scaled_dot_product_attention(
            query[1:, :, 55:], key[1:, :, 13:], value[1:, :, 13:], causal_alignment="lower_right", **more
        )
        assert torch.equal(last[1:], alone)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"causal_alignment": "lower"}, ValueError, "causal_alignment must be 'upper_left' or 'lower_right'"),
        ({"causal_alignment": "lower_right"}, ValueError, "is for is_causal=True, a window_size, a mask, alibi"),
        (
            {"causal_alignment": "lower_right", "attn_mask": causal_upper_left(43, 51)},
            ValueError,
            "contradicts attn_mask",
        ),
    ],
)
def test_an_alignment_that_says_nothing_or_the_contrary(given, error, message) -> None:
    query, key, value, *_ = random_inputs((2, 2, 43, 51, 6))
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(query, key, value, **given)
