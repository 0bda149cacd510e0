"""Padding: a padded sequence gives what it gives alone, and nothing stored at a padded position reaches a result."""

from __future__ import annotations

import math

import mra_attention
import pytest
import torch
from helpers import (
    assert_close,
    assert_matches_oracle,
    assert_results_close,
    assert_same_bits,
    block_mask,
    random_inputs,
    random_mask,
    run_package,
)
from oracle import Result, Settings
from torch import Tensor

MODES = pytest.mark.parametrize("mode", ["full", "sparse"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def right_padding(lengths: list[int], size: int) -> Tensor:
    return torch.arange(size) < torch.tensor(lengths)[:, None]


@MODES
@pytest.mark.parametrize("block_size", [8, 32])
@pytest.mark.parametrize("forced", [(0, 0), (1, 3)], ids=str)
def test_padded_batch_gives_what_each_sequence_gives_alone(mode, block_size, forced):
    lengths = [100, 1, 37, 64, 8]
    inputs = random_inputs((5, 2, 100, 100, 16))
    mask = right_padding(lengths, 100)
    more = {
        "block_size": block_size,
        "mode": mode,
        "blocks_per_row": 1.6,
        "first_blocks": forced[0],
        "diagonal_blocks": forced[1],
    }
    settings = Settings(key_mask=mask, query_mask=mask, **more)
    selected = block_mask(inputs[0], inputs[1], settings)
    together = run_package(*inputs[:3], settings, *inputs[3:])
    for item, length in enumerate(lengths):
        alone_inputs = [x[item : item + 1, :, :length] for x in inputs]
        alone = run_package(*alone_inputs[:3], Settings(**more), *alone_inputs[3:])
        blocks = -(-length // block_size)
        alone_selected = block_mask(alone_inputs[0], alone_inputs[1], Settings(**more))
        assert torch.equal(selected[item : item + 1, :, :blocks, :blocks], alone_selected)
        assert selected[item].sum() == alone_selected.sum()
        for name, a, e in zip(Result._fields, together, alone, strict=True):
            assert_close(a[item : item + 1, :, :length], e, f"{name} of item {item}")


@MODES
def test_different_query_and_key_lengths_per_item(mode):
    query_mask, key_mask = right_padding([70, 3, 41], 70), right_padding([12, 90, 65], 90)
    inputs = random_inputs((3, 2, 70, 90, 16))
    settings = Settings(block_size=8, mode=mode, blocks_per_row=2.0, key_mask=key_mask, query_mask=query_mask)
    together = run_package(*inputs[:3], settings, *inputs[3:])
    query, key, value, grad_out, grad_lse = inputs
    for item, (rows, columns) in enumerate([(70, 12), (3, 90), (41, 65)]):
        one = slice(item, item + 1)
        alone = run_package(
            query[one, :, :rows],
            key[one, :, :columns],
            value[one, :, :columns],
            Settings(block_size=8, mode=mode, blocks_per_row=2.0),
            grad_out[one, :, :rows],
            grad_lse[one, :, :rows],
        )
        sizes = {"out": rows, "lse": rows, "dq": rows, "dk": columns, "dv": columns}
        for name, a, e in zip(Result._fields, together, alone, strict=True):
            assert_close(a[one, :, : sizes[name]], e, f"{name} of item {item}")


@MODES
@DTYPES
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("holes", [False, True], ids=["right-padded", "holes"])
def test_nothing_stored_in_the_padding_reaches_a_result(mode, dtype, poison, holes):
    inputs = random_inputs((3, 2, 70, 90, 17), value_dim=13, dtype=dtype)
    if holes:
        query_mask, key_mask = random_mask(3, 70, seed=1), random_mask(3, 90, seed=2)
    else:
        query_mask, key_mask = right_padding([70, 3, 41], 70), right_padding([12, 90, 65], 90)
    settings = Settings(block_size=8, mode=mode, blocks_per_row=2.0, key_mask=key_mask, query_mask=query_mask)
    clean = run_package(*inputs[:3], settings, *inputs[3:])
    hidden_query, hidden_key = ~query_mask[:, None, :, None], ~key_mask[:, None, :, None]
    query, key, value, grad_out, grad_lse = inputs
    poisoned = run_package(
        query.masked_fill(hidden_query, poison),
        key.masked_fill(hidden_key, poison),
        value.masked_fill(hidden_key, poison),
        settings,
        grad_out.masked_fill(hidden_query, poison),
        grad_lse.masked_fill(hidden_query[..., 0], poison),
    )
    assert_same_bits(poisoned, clean)
    assert (clean.dq.masked_select(hidden_query) == 0).all()
    assert (clean.dk.masked_select(hidden_key) == 0).all()
    assert (clean.dv.masked_select(hidden_key) == 0).all()


@MODES
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_each_input_poisoned_by_itself(mode, which):
    """Self-attention with one mask; a finite input of the same product must not hide a 0 * NaN of the other."""
    inputs = dict(zip(("query", "key", "value", "grad_out", "grad_lse"), random_inputs((2, 2, 45, 45, 8)), strict=True))
    mask = right_padding([45, 22], 45)
    settings = Settings(block_size=8, mode=mode, blocks_per_row=2.0, key_mask=mask, query_mask=mask)
    clean = run_package(settings=settings, **inputs)
    inputs[which] = inputs[which].masked_fill(~mask[:, None, :, None], math.nan)
    assert_same_bits(run_package(settings=settings, **inputs), clean)


@MODES
@DTYPES
def test_padded_queries_give_zero(mode, dtype):
    query, key, value, grad_out, grad_lse = random_inputs((2, 2, 45, 60, 8), dtype=dtype)
    query_mask = random_mask(2, 45, seed=1, keep=0.5)
    settings = Settings(block_size=8, mode=mode, query_mask=query_mask)
    result = run_package(query, key, value, settings, grad_out, grad_lse)
    hidden = ~query_mask[:, None, :].expand(-1, 2, -1)
    assert (result.out[hidden] == 0).all()
    assert (result.lse[hidden] == -math.inf).all()
    assert (result.dq[hidden] == 0).all()
    assert result.lse[~hidden].isfinite().all()


@MODES
@DTYPES
def test_item_without_a_valid_key(mode, dtype):
    query, key, value, grad_out, grad_lse = random_inputs((2, 2, 45, 60, 8), dtype=dtype)
    key_mask = random_mask(2, 60, seed=1)
    key_mask[0] = False
    settings = Settings(block_size=8, mode=mode, key_mask=key_mask)
    result = run_package(query, key, value, settings, grad_out, grad_lse)
    assert (result.lse[0] == -math.inf).all()
    for x in (result.out, result.dq, result.dk, result.dv):
        assert (x[0] == 0).all()
        assert x[1].abs().max() > 0
        assert x.isfinite().all()


@MODES
def test_item_without_a_valid_query(mode):
    query, key, value, grad_out, grad_lse = random_inputs((2, 2, 45, 60, 8))
    query_mask = random_mask(2, 45, seed=1)
    query_mask[1] = False
    settings = Settings(block_size=8, mode=mode, blocks_per_row=2.0, query_mask=query_mask)
    assert_matches_oracle(query, key, value, settings, grad_out, grad_lse)
    result = run_package(query, key, value, settings, grad_out, grad_lse)
    for x in (result.out, result.dq, result.dk, result.dv):
        assert (x[1] == 0).all()


@MODES
def test_key_mask_alone_leaves_every_query_in_its_mean(mode):
    """Only query_padding_mask removes queries: the same mask on the keys alone gives other coarse logits."""
    inputs = random_inputs((2, 2, 45, 45, 8))
    mask = right_padding([45, 21], 45)
    both = Settings(block_size=8, mode=mode, blocks_per_row=1.0, key_mask=mask, query_mask=mask)
    keys = Settings(block_size=8, mode=mode, blocks_per_row=1.0, key_mask=mask)
    assert_matches_oracle(*inputs[:3], keys, *inputs[3:])
    padded_row = run_package(*inputs[:3], keys, *inputs[3:]).out[1, :, 21:]
    assert padded_row.abs().amax(-1).min() > 0
    assert (run_package(*inputs[:3], both, *inputs[3:]).out[1, :, 21:] == 0).all()


@MODES
def test_one_dimensional_query_mask_serves_every_item(mode):
    query, key, value, grad_out, grad_lse = random_inputs((3, 2, 45, 60, 8))
    query_mask = random_mask(1, 45, seed=1)
    settings = Settings(block_size=8, mode=mode, query_mask=query_mask.expand(3, 45))
    expected = run_package(query, key, value, settings, grad_out, grad_lse)
    actual = run_package(query, key, value, settings, grad_out, grad_lse, query_padding_mask=query_mask[0])
    assert_same_bits(actual, expected)


def test_mask_of_all_true_changes_nothing():
    inputs = random_inputs((2, 2, 61, 90, 16))
    settings = Settings(block_size=8, blocks_per_row=2.0)
    full = Settings(
        block_size=8,
        blocks_per_row=2.0,
        key_mask=torch.ones(2, 90, dtype=torch.bool),
        query_mask=torch.ones(2, 61, dtype=torch.bool),
    )
    assert torch.equal(block_mask(*inputs[:2], full), block_mask(*inputs[:2], settings))
    unmasked = run_package(*inputs[:3], settings, *inputs[3:])
    assert_results_close(run_package(*inputs[:3], full, *inputs[3:]), unmasked)


def test_inference_without_gradients_reads_no_padding():
    query, key, value, *_ = random_inputs((2, 2, 61, 61, 16), dtype=torch.float32)
    mask = right_padding([61, 30], 61)
    settings = Settings(block_size=8, blocks_per_row=2.0, key_mask=mask, query_mask=mask)
    poisoned = [x.masked_fill(~mask[:, None, :, None], math.nan) for x in (query, key, value)]
    with torch.inference_mode():
        clean = mra_attention.scaled_dot_product_attention(query, key, value, **settings.keywords())
        out = mra_attention.scaled_dot_product_attention(*poisoned, **settings.keywords())
    assert torch.equal(out, clean)
