"""Causality, windows, masks of keys and of pairs and padded queries together: a query sees what all of them allow.

With every block exact the result is torch's attention with the mask that says the same.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from mra_attention import plan, scaled_dot_product_attention, varlen_attention
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import create_block_mask

BATCH, HEADS, QUERIES, KEYS = 2, 4, 43, 51
ROWS, COLUMNS = torch.arange(QUERIES)[:, None], torch.arange(KEYS)

pytestmark = pytest.mark.filterwarnings("ignore:Lower right causal bias:UserWarning")


def inputs() -> list[Tensor]:
    sizes = ((QUERIES, 6), (KEYS, 6), (KEYS, 5))
    return [torch.randn(BATCH, HEADS, *size, dtype=torch.float64, requires_grad=True) for size in sizes]


def expected(tensors: list[Tensor], visible: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    """Output and gradients of torch's attention; a query that sees nothing has the output and the gradient 0."""
    added = torch.zeros(visible.shape, dtype=torch.float64) if bias is None else bias.expand(visible.shape)
    blind = ~visible.any(-1, keepdim=True)
    added = added.masked_fill(~(visible | blind), -math.inf)
    out = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=added).masked_fill(blind, 0.0)
    return [out, *torch.autograd.grad(out.square().sum(), tensors)]


def results(tensors: list[Tensor], **arguments: Any) -> list[Tensor]:
    out = scaled_dot_product_attention(*tensors, resolutions=(8, 1), blocks_per_row=math.inf, **arguments)
    return [out, *torch.autograd.grad(out.square().sum(), tensors)]


CAUSAL: dict[str, tuple[dict[str, Any], Tensor, int]] = {
    "all": ({}, torch.ones(QUERIES, KEYS, dtype=torch.bool), 0),
    "causal": ({"is_causal": True}, ROWS >= COLUMNS, 0),
    "upper left": ({"attn_mask": causal_upper_left(QUERIES, KEYS)}, ROWS >= COLUMNS, 0),
    "lower right": ({"attn_mask": causal_lower_right(QUERIES, KEYS)}, ROWS + 8 >= COLUMNS, 8),
}
WINDOWS = [(-1, -1), (9, -1), (-1, 4), (13, 2), (0, 0)]
MASKS: dict[str, Tensor | None] = {
    "none": None,
    "keys": (torch.arange(BATCH * KEYS).view(BATCH, 1, 1, KEYS) % 7) > 1,
    "pairs": (ROWS * 3 + COLUMNS * 5) % 11 > 2,
    "bias": torch.where((ROWS + COLUMNS) % 5 > 0, -0.1 * (ROWS - COLUMNS).abs().double(), -math.inf),
}


@pytest.mark.parametrize(("causal", "mask"), list(itertools.product(CAUSAL, MASKS)))
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded queries"])
def test_a_query_sees_what_all_allow(causal, mask, padded):
    given, sees, offset = CAUSAL[causal]
    if MASKS[mask] is not None and "attn_mask" in given:
        pytest.skip("a CausalBias is the attn_mask itself")
    tensors, of_pairs = inputs(), MASKS[mask]
    valid = torch.arange(QUERIES).expand(BATCH, QUERIES) % 6 > 0
    for left, right in WINDOWS:
        visible = sees.expand(BATCH, HEADS, QUERIES, KEYS)
        distance = COLUMNS - ROWS - offset
        visible = visible & (distance >= -left if left >= 0 else True) & (distance <= right if right >= 0 else True)
        arguments: dict[str, Any] = {"window_size": (left, right), **given}
        bias = None
        if of_pairs is not None:
            arguments["attn_mask"] = of_pairs
            visible = visible & (of_pairs if of_pairs.dtype is torch.bool else of_pairs != -math.inf)
            bias = None if of_pairs.dtype is torch.bool else of_pairs.masked_fill(of_pairs == -math.inf, 0.0)
        if padded:
            arguments["query_padding_mask"] = valid
            visible = visible & valid[:, None, :, None]
        for actual, want in zip(results(tensors, **arguments), expected(tensors, visible, bias), strict=True):
            torch.testing.assert_close(actual, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("window", [(9, -1), (13, 2)], ids=str)
@pytest.mark.parametrize("alignment", ["upper_left", "lower_right"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_windows_of_packed_sequences(window, alignment, is_causal):
    lengths, key_lengths = [5, 0, 20, 18], [9, 3, 20, 19]
    query, key, value = (x.transpose(0, 1) for x in (y[0] for y in inputs()))
    starts, key_starts = ([0, *itertools.accumulate(x)] for x in (lengths, key_lengths))
    block: dict[str, Any] = {"resolutions": (8, 1), "blocks_per_row": math.inf}
    out = varlen_attention(
        query,
        key,
        value,
        starts,
        key_starts,
        is_causal=is_causal,
        window_size=window,
        causal_alignment=alignment,
        **block,
    )
    for item, (length, key_length) in enumerate(zip(lengths, key_lengths, strict=True)):
        of_query = slice(starts[item], starts[item + 1])
        of_key = slice(key_starts[item], key_starts[item + 1])
        offset = key_length - length if alignment == "lower_right" else 0
        distance = torch.arange(key_length) - torch.arange(length)[:, None] - offset
        visible = (
            (distance >= -window[0]) & ((distance <= window[1]) | (window[1] < 0)) & ((distance <= 0) | (not is_causal))
        )
        tensors = [x.transpose(0, 1)[None] for x in (query[of_query], key[of_key], value[of_key])]
        want = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=visible)
        want = want.masked_fill(~visible.any(-1, keepdim=True), 0.0)
        torch.testing.assert_close(out[of_query], want[0].transpose(0, 1), rtol=1e-9, atol=1e-10)


DOCUMENTS = torch.arange(64) // 17


def documents(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (DOCUMENTS[i] == DOCUMENTS[j]) & (i >= j)


def by_item_and_head(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i - j).abs() <= 3 * h + 11 * b


@pytest.mark.parametrize(
    ("mask_mod", "batch", "heads"),
    [(documents, None, None), (by_item_and_head, BATCH, HEADS), (by_item_and_head, None, HEADS)],
)
@pytest.mark.parametrize("block", [16, (16, 32), 128], ids=str)
def test_a_block_mask_of_flex_attention(mask_mod, batch, heads, block):
    """Gives what the mask of pairs gives, whatever the size of its blocks."""
    tensors = inputs()
    mask = create_block_mask(mask_mod, batch, heads, QUERIES, KEYS, device="cpu", BLOCK_SIZE=block)
    items, numbers = torch.arange(batch or 1)[:, None, None, None], torch.arange(heads or 1)[:, None, None]
    pairs = mask_mod(items, numbers, ROWS, COLUMNS).expand(batch or 1, heads or 1, QUERIES, KEYS)
    visible = pairs.expand(BATCH, HEADS, QUERIES, KEYS)
    for actual, want in zip(results(tensors, attn_mask=mask), expected(tensors, visible), strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-9, atol=1e-10)
    causal = results(tensors, attn_mask=mask, is_causal=True)
    for actual, want in zip(causal, expected(tensors, visible & (ROWS >= COLUMNS)), strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-9, atol=1e-10)


def test_mask_mod_is_called_for_partial_blocks_only():
    """A full block is full, whatever mask_mod would say."""
    mask = create_block_mask(lambda b, h, i, j: i // 16 >= j // 16, None, None, 48, 48, device="cpu", BLOCK_SIZE=16)
    mask.mask_mod = lambda b, h, i, j: i < 0
    query, key, value = torch.randn(3, 1, 2, 48, 8).unbind()
    out = scaled_dot_product_attention(query, key, value, mask, blocks_per_row=math.inf)
    blocks = torch.arange(48) // 16
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=blocks[:, None] >= blocks)
    torch.testing.assert_close(out, want)


def test_a_block_mask_in_a_compiled_function_and_in_a_plan():
    mask = create_block_mask(documents, None, None, QUERIES, KEYS, device="cpu", BLOCK_SIZE=16)
    tensors = [x.detach() for x in inputs()]

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, mask, resolutions=(8, 1), blocks_per_row=2)

    expected = attention(*tensors)
    torch.compiler.reset()
    assert torch.equal(torch.compile(attention, backend="aot_eager")(*tensors), expected)
    chosen = plan(*tensors[:2], mask, resolutions=(8, 1), blocks_per_row=2)
    assert torch.equal(scaled_dot_product_attention(*tensors, mask, plan=chosen), expected)


def test_a_block_mask_below_vmap():
    mask = create_block_mask(documents, None, None, QUERIES, KEYS, device="cpu", BLOCK_SIZE=16)
    batches = [torch.stack([x.detach(), -x.detach()]) for x in inputs()]

    def attention(*tensors: Tensor) -> Tensor:
        return scaled_dot_product_attention(*tensors, mask, resolutions=(8, 1))

    out = torch.vmap(attention)(*batches)
    assert torch.equal(out, torch.stack([attention(*(x[i] for x in batches)) for i in range(2)]))
