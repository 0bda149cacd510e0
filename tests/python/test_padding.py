"""Padding: a padded sequence gives what it gives alone, and nothing stored at a padded position reaches a result."""

from __future__ import annotations

import math
from typing import Any

import mra_attention
import pytest
import torch
from helpers import (
    assert_close,
    assert_matches_oracle,
    assert_results_close,
    assert_same_bits,
    assert_same_selection,
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


# Whom the tokens of a sequence see, beside padding.
FORMS: dict[str, dict[str, Any]] = {
    "block": {},
    "forced": {"first_blocks": 1, "diagonal_blocks": 3},
    "tokens": {"pool_queries": False},
    "causal": {"is_causal": True},
    "window": {"window": (21, 6)},
    "causal window": {"is_causal": True, "window": (13, -1)},
}
by_form = pytest.mark.parametrize("form", FORMS)


def padded_batch(
    lengths: list[int], size: int, side: str, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, list[slice]]:
    """query, key, value, grad_out, grad_lse; which tokens are valid; where each sequence lies."""
    inputs = list(random_inputs((len(lengths), 2, size, size, 16), dtype=dtype))
    mask = right_padding(lengths, size)
    if side == "right":
        return inputs, mask, [slice(0, length) for length in lengths]
    return inputs, mask.flip(-1), [slice(size - length, size) for length in lengths]


def spell(mask: Tensor, spelling: str, size: int) -> dict[str, Tensor | None]:
    """Settings that say that these keys are padding."""
    rows = mask[:, None, None]
    if spelling == "keys and queries":
        return {"key_mask": mask, "query_mask": mask}
    if spelling == "keys":
        return {"key_mask": mask}
    if spelling == "every pair":
        return {"bias": rows.expand(-1, 2, size, size).clone()}
    if spelling == "bias":
        return {"bias": torch.zeros(rows.shape).masked_fill(~rows, -math.inf)}
    assert spelling == "valid pairs"
    return {"bias": rows & mask[:, None, :, None]}


@MODES
@by_form
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("spelling", ["keys", "keys and queries", "every pair", "bias", "valid pairs"])
def test_padded_batch_gives_what_each_sequence_gives_alone(mode, form, side, spelling):
    """To the bit, gradients too."""
    lengths, size = [100, 1, 37, 64, 8], 100
    for dtype in (torch.float32, torch.float64):
        inputs, mask, places = padded_batch(lengths, size, side, dtype)
        # No loss reads the outputs of padded queries.
        inputs[3] = inputs[3] * mask[:, None, :, None]
        inputs[4] = inputs[4] * mask[:, None]
        more = {"block_size": 8, "mode": mode, "blocks_per_row": 1.6} | FORMS[form]
        together = run_package(*inputs[:3], Settings(**more, **spell(mask, spelling, size)), *inputs[3:])
        for item, place in enumerate(places):
            alone_inputs = [x[item : item + 1, :, place] for x in inputs]
            alone = run_package(*alone_inputs[:3], Settings(**more), *alone_inputs[3:])
            for name, a, e in zip(Result._fields, together, alone, strict=True):
                assert torch.equal(a[item : item + 1, :, place], e), f"{name} of item {item}, {dtype}"


@by_form
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_of_any_length(form, side):
    """Every number of padded tokens in front of and behind a sequence, and the blocks that it selects."""
    length = 21
    for extra in range(1, 20):
        size = length + extra
        inputs, mask, (place,) = padded_batch([length], size, side, torch.float32)
        more = {"block_size": 8, "blocks_per_row": 1.0} | FORMS[form]
        out, lse, *_ = run_package(*inputs[:3], Settings(key_mask=mask, **more), *inputs[3:])
        alone = [x[:, :, place] for x in inputs]
        expected = run_package(*alone[:3], Settings(**more), *alone[3:])
        assert torch.equal(out[:, :, place], expected.out), extra
        assert torch.equal(lse[:, :, place], expected.lse), extra
        selected = block_mask(inputs[0], inputs[1], Settings(key_mask=mask, query_mask=mask, **more))
        if form in ("block", "forced"):
            assert_same_selection(selected, block_mask(alone[0], alone[1], Settings(**more)))
        else:
            assert_same_selection(selected[:, :, place], block_mask(alone[0], alone[1], Settings(**more)))


@MODES
@by_form
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("spelling", ["keys", "every pair", "valid pairs"])
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
def test_nan_in_the_padding_reaches_nothing(mode, form, side, spelling, poison):
    """Without query_padding_mask padded queries have outputs, which may be NaN; the gradients of others are not."""
    lengths, size = [45, 8, 22], 45
    inputs, mask, _ = padded_batch(lengths, size, side, torch.float32)
    inputs[3] = inputs[3] * mask[:, None, :, None]
    inputs[4] = inputs[4] * mask[:, None]
    more = {"block_size": 8, "mode": mode, "blocks_per_row": 1.6} | FORMS[form]
    settings = Settings(**more, **spell(mask, spelling, size))
    clean = run_package(*inputs[:3], settings, *inputs[3:])
    poisoned = [x.masked_fill(~mask[:, None, :, None], poison) for x in inputs[:3]]
    result = run_package(*poisoned, settings, *inputs[3:])
    for name in ("out", "lse", "dq"):
        valid = mask[:, None].expand(-1, 2, -1)
        assert torch.equal(getattr(result, name)[valid], getattr(clean, name)[valid]), name
    assert torch.equal(result.dk, clean.dk)
    assert torch.equal(result.dv, clean.dv)
    assert (result.dk.masked_select(~mask[:, None, :, None]) == 0).all()


def test_everything_exact_is_torch_attention_in_padded_rows_too():
    query, key, value, *_ = random_inputs((3, 2, 45, 45, 8))
    for side in ("right", "left"):
        mask = right_padding([45, 8, 22], 45)
        mask = mask if side == "right" else mask.flip(-1)
        settings = Settings(block_size=8, blocks_per_row=math.inf, key_mask=mask)
        out = mra_attention.scaled_dot_product_attention(query, key, value, **settings.keywords())
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        assert_close(out, expected, f"out, padded on the {side}")


def test_padding_of_keys_is_not_that_of_queries_where_a_mask_says_so():
    """Cross-attention of equal lengths passes an all-true query_padding_mask; of unequal ones it need not."""
    inputs = random_inputs((2, 2, 45, 45, 8))
    mask = right_padding([45, 21], 45)
    every = torch.ones(2, 45, dtype=torch.bool)
    implied = Settings(block_size=8, blocks_per_row=1.0, key_mask=mask)
    cross = Settings(block_size=8, blocks_per_row=1.0, key_mask=mask, query_mask=every)
    for settings in (implied, cross):
        assert_matches_oracle(*inputs[:3], settings, *inputs[3:])
    out = [run_package(*inputs[:3], settings, *inputs[3:]).out for settings in (implied, cross)]
    assert torch.equal(out[0][0], out[1][0])
    assert not torch.equal(out[0][1], out[1][1])
    assert out[0][1, :, 21:].abs().amax(-1).min() > 0


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
