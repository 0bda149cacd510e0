"""The oracle itself agrees with torch's exact attention, the released code and the closed-form backward."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from data import UPSTREAM, load_upstream
from oracle import Settings
from torch.nn.functional import scaled_dot_product_attention


def inputs(shape: tuple[int, int, int, int, int, int, int], seed: int = 0) -> tuple[torch.Tensor, ...]:
    batch, heads, key_heads, query_length, key_length, dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return (
        normal(batch, heads, query_length, dim),
        normal(batch, key_heads, key_length, dim),
        normal(batch, key_heads, key_length, value_dim),
        normal(batch, heads, query_length, value_dim),
        normal(batch, heads, query_length),
    )


SHAPES = [
    pytest.param((2, 2, 2, 23, 23, 8, 8), id="self"),
    pytest.param((2, 4, 2, 17, 40, 5, 3), id="cross-gqa-dv"),
    pytest.param((1, 1, 1, 1, 1, 1, 1), id="one"),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "key-mask"])
def test_everything_selected_is_exact_attention(shape, mode, masked):
    query, key, value, grad_out, _ = inputs(shape)
    key_mask = torch.rand(shape[0], shape[4], generator=torch.Generator().manual_seed(3)) < 0.6 if masked else None
    settings = Settings(block_size=8, mode=mode, blocks_per_row=1e9, key_mask=key_mask)
    selected = oracle.select(query, key, settings)
    result = oracle.run(query, key, value, selected, settings, grad_out)

    assert torch.equal(selected, oracle.live_blocks(query, key, settings)[:, None].expand_as(selected))
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    mask = None if key_mask is None else key_mask[:, None, None, :]
    expected = scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(result.out, expected.detach(), rtol=0, atol=1e-13)
    for actual, wanted in zip(result[2:], torch.autograd.grad(expected, leaves, grad_out), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)
    expanded = key.repeat_interleave(shape[1] // shape[2], dim=1)
    logits = query @ expanded.transpose(-1, -2) / math.sqrt(shape[5])
    logits = logits if mask is None else logits.masked_fill(~mask, -math.inf)
    torch.testing.assert_close(result.lse, logits.logsumexp(-1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "masks"])
@pytest.mark.parametrize("blocks_per_row", [0.0, 1.7])
def test_closed_form_backward_equals_autograd(shape, mode, masked, blocks_per_row):
    query, key, value, grad_out, grad_lse = inputs(shape)
    key_mask = query_mask = None
    if masked:
        generator = torch.Generator().manual_seed(5)
        key_mask = torch.rand(shape[0], shape[4], generator=generator) < 0.6
        query_mask = torch.rand(shape[0], shape[3], generator=generator) < 0.6
    settings = Settings(
        block_size=8, mode=mode, blocks_per_row=blocks_per_row, key_mask=key_mask, query_mask=query_mask
    )
    selected = oracle.select(query, key, settings)
    result = oracle.run(query, key, value, selected, settings, grad_out, grad_lse)
    closed = oracle.closed_form_gradients(
        query, key, value, selected, settings, grad_out, grad_lse, result.out, result.lse
    )
    for actual, wanted in zip(closed, result[2:], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", UPSTREAM)
def test_released_code(name):
    case = load_upstream(name)
    selected = oracle.select(case.query, case.key, case.settings)
    result = oracle.run(case.query, case.key, case.value, selected, case.settings, case.grad_out)
    for actual, wanted in ((result.out, case.out), (result.dq, case.dq), (result.dk, case.dk), (result.dv, case.dv)):
        torch.testing.assert_close(actual, wanted.double(), rtol=0, atol=5e-6)


def test_coarse_block_by_hand():
    """Two key blocks, the second one short: exp(c) counts once per key and meets the mean of the values."""
    query = torch.tensor([1.0, 3.0], dtype=torch.float64).view(1, 1, 2, 1)
    key = torch.tensor([0.5] * 8 + [-1.0, 0.0], dtype=torch.float64).view(1, 1, 10, 1)
    value = torch.arange(10, dtype=torch.float64).view(1, 1, 10, 1)
    settings = Settings(block_size=8, num_blocks=1, scale=1.0)
    selected = oracle.select(query, key, settings)
    assert selected.tolist() == [[[[True, False]]]]

    out, lse = oracle.attention(query, key, value, selected, settings)
    coarse = math.exp(2.0 * -0.5)
    for t, q in enumerate((1.0, 3.0)):
        total = 8 * math.exp(q * 0.5) + 2 * coarse
        assert lse[0, 0, t].item() == pytest.approx(math.log(total), abs=1e-14)
        expected = (8 * math.exp(q * 0.5) * 3.5 + 2 * coarse * 8.5) / total
        assert out[0, 0, t, 0].item() == pytest.approx(expected, abs=1e-13)
    sparse_out, _ = oracle.attention(query, key, value, selected, Settings(block_size=8, mode="sparse", scale=1.0))
    torch.testing.assert_close(sparse_out, torch.full_like(sparse_out, 3.5), rtol=0, atol=1e-13)


def test_masks_by_hand():
    """Means run over valid tokens only; padded queries and queries without a key give 0 and -inf."""
    nan = math.nan
    query = torch.tensor([2.0, nan, 1.0], dtype=torch.float64).view(1, 1, 3, 1).repeat(2, 1, 1, 1)
    key = torch.tensor([nan] * 8 + [3.0, nan, 5.0], dtype=torch.float64).view(1, 1, 11, 1).repeat(2, 1, 1, 1)
    key_mask = torch.tensor([[False] * 8 + [True, False, True], [False] * 11])
    query_mask = torch.tensor([[True, False, True]]).expand(2, 3)
    settings = Settings(block_size=8, scale=1.0, key_mask=key_mask, query_mask=query_mask)
    selected = oracle.select(query, key, settings)
    assert selected.tolist() == [[[[False, True]]], [[[False, False]]]]

    none = torch.zeros_like(selected)
    out, lse = oracle.attention(query, key, key, none, settings)
    assert out[0, 0, :, 0].tolist() == pytest.approx([4.0, 0.0, 4.0])
    assert lse[0, 0].tolist() == pytest.approx([math.log(2) + 1.5 * 4.0, -math.inf, math.log(2) + 1.5 * 4.0])
    assert out[1].abs().max() == 0.0
    assert (lse[1] == -math.inf).all()
    result = oracle.run(query, key, key, none, settings, torch.full_like(query, 1.0), torch.ones_like(lse))
    assert all(x.isfinite().all() for x in result[2:])
