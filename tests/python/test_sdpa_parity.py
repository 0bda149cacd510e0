"""With every block selected the result is torch's scaled_dot_product_attention.

Float64 agrees to 1e-10. Lower precision: the error against float64 is at most 2x (gradients 3x) the error that torch's
own attention of that dtype makes on the same inputs, on average and in every block (docs/definitions.md, section 7), or
the error that plain float32 makes (plain_float32.py).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import mra_attention
import plain_float32
import pytest
import torch
from helpers import (
    Budget,
    assert_close,
    assert_results_within_budget,
    assert_within_budget,
    everything,
    named,
    random_inputs,
    random_mask,
    summation_orders,
)
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention

LOW_PRECISION = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, *LOW_PRECISION], ids=str)
NAMES = ("out", "dq", "dk", "dv")
MODES = ("full", "sparse")


def value_and_gradients(function, inputs: tuple[Tensor, ...], grad_out: Tensor, **keywords: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, **keywords)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def torchs_own(inputs: tuple[Tensor, ...], grad_out: Tensor, **shared: Any) -> list[list[Tensor]]:
    """What torch's attention of the same dtype gives, for several orders of the features."""
    query, key, value = inputs
    results = []
    for order in summation_orders(query.shape[-1]):
        permuted = (query[..., order], key[..., order], value)
        out, dq, dk, dv = value_and_gradients(scaled_dot_product_attention, permuted, grad_out, **shared)
        back = order.argsort()
        results.append([out, dq[..., back], dk[..., back], dv])
    return results


def assert_parity(
    inputs: tuple[Tensor, ...],
    grad_out: Tensor,
    *,
    modes: Sequence[str] = ("full",),
    block_sizes: Sequence[int] = (32,),
    budgets: Sequence[dict[str, Any]] = ({"blocks_per_row": 1e9},),
    torchs: Callable[[list[Tensor]], list[list[Tensor]]] | None = None,
    **shared: Any,
) -> None:
    """Every mode, block size and budget gives torch's result, which they share.

    shared: arguments that both functions take. torchs: from the exact results, what to take for those of torch.
    """
    in_double = tuple(x.double() for x in inputs)
    expected = value_and_gradients(scaled_dot_product_attention, in_double, grad_out.double(), **shared)
    exact = inputs[0].dtype == torch.float64
    comparisons = torchs(expected) if torchs is not None else [] if exact else torchs_own(inputs, grad_out, **shared)
    budget = Budget(comparisons, functools.cache(lambda: plain_float32.attention(*inputs, grad_out, **shared)))
    for mode, block_size, blocks in itertools.product(modes, block_sizes, budgets):
        own = {"resolutions": (block_size, 1), "mode": mode} | blocks
        actual = value_and_gradients(mra_attention.scaled_dot_product_attention, inputs, grad_out, **shared, **own)
        assert all(x.dtype == inputs[0].dtype for x in actual)
        with named(own):
            if exact:
                for name, a, e in zip(NAMES, actual, expected, strict=True):
                    assert_close(a, e, name)
            else:
                assert_results_within_budget(actual, expected, budget, names=NAMES, block_size=block_size)


@DTYPES
@pytest.mark.parametrize("lengths", [(256, 256), (263, 263), (129, 500), (500, 129)], ids=str)
def test_lengths(dtype, lengths):
    query, key, value, grad_out, _ = random_inputs((2, 4, *lengths, 64), dtype=dtype)
    assert_parity((query, key, value), grad_out, modes=MODES, block_sizes=(8, 32, 128))


@DTYPES
@pytest.mark.parametrize("dims", [(1, 1), (8, 8), (17, 17), (32, 80), (96, 96), (128, 128)], ids=str)
def test_head_dimensions(dtype, dims):
    query, key, value, grad_out, _ = random_inputs((2, 4, 200, 233, dims[0]), value_dim=dims[1], dtype=dtype)
    assert_parity((query, key, value), grad_out)


@DTYPES
def test_every_way_to_ask_for_everything(dtype):
    query, key, value, grad_out, _ = random_inputs((2, 2, 256, 256, 32), dtype=dtype)
    budgets = [{"num_blocks": 10**9}, {"num_blocks": 64}, {"blocks_per_row": 8.0}]
    assert_parity((query, key, value), grad_out, modes=MODES, budgets=budgets)


@DTYPES
@pytest.mark.parametrize("key_heads", [1, 2, 3])
def test_grouped_query_heads(dtype, key_heads):
    query, key, value, grad_out, _ = random_inputs((2, 6, 200, 233, 32), key_heads=key_heads, dtype=dtype)
    assert_parity((query, key, value), grad_out, modes=MODES, enable_gqa=True)


# torch warns that queries before the first key see nothing; here none is.
@pytest.mark.filterwarnings("ignore:Lower right causal bias:UserWarning")
@DTYPES
@pytest.mark.parametrize("lengths", [(256, 256), (129, 300), (300, 129)], ids=str)
@pytest.mark.parametrize("aligned", ["is_causal", causal_upper_left, causal_lower_right])
def test_causal(dtype, lengths, aligned):
    query, key, value, grad_out, _ = random_inputs((1, 4, *lengths, 32), key_heads=2, value_dim=40, dtype=dtype)
    shared = {"is_causal": True} if aligned == "is_causal" else {"attn_mask": aligned(*lengths)}
    assert_parity((query, key, value), grad_out, modes=MODES, enable_gqa=True, **shared)


@DTYPES
@pytest.mark.parametrize("keep", [0.05, 0.5, 0.9])
def test_key_padding_mask(dtype, keep):
    query, key, value, grad_out, _ = random_inputs((3, 4, 200, 233, 32), dtype=dtype)
    mask = random_mask(3, 233, seed=1, keep=keep)[:, None, None, :]
    assert_parity((query, key, value), grad_out, modes=MODES, attn_mask=mask)


MASKS = {
    "(1, Lk)": lambda mask: mask[:1],
    "(1, 1, Lk)": lambda mask: mask[:1, None],
    "(1, 1, 1, Lk)": lambda mask: mask[:1, None, None],
    "(B, 1, Lq, Lk) expanded": lambda mask: mask[:, None, None].expand(-1, -1, 200, -1),
    "(B, H, Lq, Lk) expanded": lambda mask: mask[:, None, None].expand(-1, 4, 200, -1),
    "(1, 1, Lq, Lk) expanded": lambda mask: mask[:1, None, None].expand(-1, -1, 200, -1),
    "strided": lambda mask: mask.repeat_interleave(2, -1)[:, None, None, ::2],
}


@pytest.mark.parametrize("shape", MASKS)
def test_mask_shapes(shape):
    query, key, value, grad_out, _ = random_inputs((3, 4, 200, 233, 32))
    assert_parity((query, key, value), grad_out, attn_mask=MASKS[shape](random_mask(3, 233, seed=1)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_an_item_without_any_key(dtype):
    query, key, value, grad_out, _ = random_inputs((3, 4, 200, 233, 32), dtype=dtype)
    mask = random_mask(3, 233, seed=1)
    mask[1] = False
    assert_parity((query, key, value), grad_out, attn_mask=mask[:, None, None, :])


@DTYPES
@pytest.mark.parametrize("scale", [None, 0.0, 0.05, 1.0, -0.3])
def test_scale(dtype, scale):
    query, key, value, grad_out, _ = random_inputs((2, 4, 200, 233, 32), dtype=dtype)
    assert_parity((query, key, value), grad_out, scale=scale)


@DTYPES
def test_large_logits(dtype):
    query, key, value, grad_out, _ = random_inputs((2, 4, 200, 233, 32), dtype=dtype, magnitude=4.0)
    assert_parity((query, key, value), grad_out, modes=MODES)


SHAPES = {
    "2-D": ((100, 16), (120, 16)),
    "3-D": ((3, 100, 16), (3, 120, 16)),
    "5-D": ((2, 3, 4, 100, 16), (2, 3, 4, 120, 16)),
    "6-D": ((1, 2, 3, 2, 50, 16), (1, 2, 3, 2, 60, 16)),
    "broadcast-batch": ((1, 4, 100, 16), (3, 4, 120, 16)),
    "broadcast-keys": ((3, 4, 100, 16), (1, 4, 120, 16)),
    "5-D-broadcast": ((2, 1, 4, 100, 16), (1, 3, 4, 120, 16)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(dtype, shapes):
    generator = torch.Generator().manual_seed(0)
    query_shape, key_shape = shapes
    query, key, value = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in (query_shape, key_shape, key_shape)
    )
    batch = torch.broadcast_shapes(query_shape[:-2], key_shape[:-2])
    grad_out = torch.randn(*batch, *query_shape[-2:], generator=generator).to(dtype)
    assert_parity((query, key, value), grad_out, block_sizes=(16,))


@pytest.mark.parametrize("shape", ["3-D", "5-D"])
def test_shape_of_lse(shape):
    query_shape, key_shape = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(*x, generator=generator, dtype=torch.float64) for x in (query_shape, key_shape))
    _, lse = mra_attention.scaled_dot_product_attention(query, key, key, blocks_per_row=1e9, return_lse=True)
    logits = query @ key.transpose(-1, -2) / math.sqrt(16)
    assert_close(lse, logits.logsumexp(-1), "lse")


@DTYPES
def test_transposed_layout(dtype):
    """Heads split off a (B, L, H * D) projection: same result, and the output is laid out for merging the heads."""
    generator = torch.Generator().manual_seed(0)
    projections = [torch.randn(2, 100, 4 * 16, generator=generator).to(dtype) for _ in range(4)]
    query, key, value, grad_out = (x.view(2, 100, 4, 16).transpose(1, 2) for x in projections)
    assert_parity((query, key, value), grad_out, block_sizes=(16,))
    out = mra_attention.scaled_dot_product_attention(query, key, value, resolutions=(16, 1))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("mode", MODES)
def test_log_sum_exp(mode):
    query, key, value, _, grad_lse = random_inputs((2, 4, 200, 233, 32))
    leaves = [x.clone().requires_grad_() for x in (query, key)]
    settings = everything(mode=mode)
    _, lse = mra_attention.scaled_dot_product_attention(*leaves, value, return_lse=True, **settings.keywords())
    gradients = torch.autograd.grad(lse, leaves, grad_lse)
    copies = [x.clone().requires_grad_() for x in (query, key)]
    expected = (copies[0] @ copies[1].transpose(-1, -2) / math.sqrt(32)).logsumexp(-1)
    assert_close(lse.detach(), expected.detach(), "lse")
    for name, a, e in zip(("dq", "dk"), gradients, torch.autograd.grad(expected, copies, grad_lse), strict=True):
        assert_close(a, e, name)


def test_budget_notices_one_wrong_block():
    """The comparison itself: one block in fifty off by ten times the comparison's error fails, as does a small bias."""
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(1, 1, 1600, 32, generator=generator, dtype=torch.float64)
    comparison = expected.float() + 1e-6 * torch.randn(1, 1, 1600, 32, generator=generator)
    budget: Any = {"comparisons": [comparison], "floor": lambda: comparison}
    assert_within_budget(comparison, expected, name="itself", factor=1.0, **budget)
    wrong = comparison.clone()
    wrong[:, :, 64:96] += 1e-5
    with pytest.raises(AssertionError, match="block at token 64"):
        assert_within_budget(wrong, expected, name="out", factor=2.0, **budget)
    with pytest.raises(AssertionError, match="root mean square"):
        assert_within_budget(comparison + 3e-6, expected, name="out", factor=2.0, **budget)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("dims", [(1, 1), (8, 8), (128, 128)], ids=str)
def test_budget_does_not_need_torchs_errors(dtype, dims):
    """If torch made no error but the rounding of its results, plain float32 would be allowance enough."""
    query, key, value, grad_out, _ = random_inputs((2, 4, 200, 233, dims[0]), value_dim=dims[1], dtype=dtype)
    assert_parity((query, key, value), grad_out, torchs=lambda exact: [[x.to(dtype) for x in exact]])


def sums_of_sizes(inputs: tuple[Tensor, ...], grad_out: Tensor) -> list[Tensor]:
    """For each element of the output and the gradients the sum of the absolute values of its terms.

    A weight counts 1 + |P| + |lse| times: rounding moves it by that many units.
    """
    q, k, v, g = (x.double().abs() for x in (*inputs, grad_out))
    scale = 1.0 / math.sqrt(q.shape[-1])
    logits = scale * inputs[0].double() @ inputs[1].double().mT
    lse = logits.logsumexp(-1, keepdim=True)
    weights = (logits - lse).exp() * (1.0 + logits.abs() + lse.abs())
    change = weights * (g @ v.mT + (g * (weights @ v)).sum(-1, keepdim=True))
    return [weights @ v, scale * change @ k, scale * change.mT @ q, weights.mT @ g]


@pytest.mark.parametrize("dims", [(1, 1), (8, 8), (128, 128)], ids=str)
def test_plain_float32_allows_little(dims):
    """Its errors are the unit roundoff times the sizes of the terms, or less; what is rounded to bfloat16 fails."""
    query, key, value, grad_out, _ = random_inputs((2, 4, 200, 233, dims[0]), value_dim=dims[1], dtype=torch.float32)
    inputs = (query, key, value)
    expected = value_and_gradients(scaled_dot_product_attention, tuple(x.double() for x in inputs), grad_out.double())
    plain = plain_float32.attention(*inputs, grad_out)
    for name, e, p, size in zip(NAMES, expected, plain, sums_of_sizes(inputs, grad_out), strict=True):
        assert 0 < (p.double() - e).norm() <= 2**-24 * size.norm(), name
        with pytest.raises(AssertionError, match=f"{name}: root mean square"):
            assert_within_budget(p.bfloat16().float(), e, [p], name, factor=3.0, floor=lambda p=p: p)


def test_plain_float32_is_a_loop():
    """To the bit what a loop with fused multiply-adds gives, whatever kernels torch and NumPy have."""
    a, b = torch.randn(2, 3, 50), torch.randn(2, 50, 4)
    with plain_float32.PlainFloat32():
        products, total = a.double() @ b.double(), a.double().sum(-1)
    for i, row, column in itertools.product(range(2), range(3), range(4)):
        expected = added = 0.0
        for x, y in zip(a[i, row].tolist(), b[i, :, column].tolist(), strict=True):
            expected, added = (
                torch.tensor(s, dtype=torch.float64).float().item() for s in (expected + x * y, added + x)
            )
        assert products[i, row, column].item() == expected
        assert total[i, row].item() == added
