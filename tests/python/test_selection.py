"""The plan equals the selection of docs/definitions.md, section 3.1 to 3.5, block for block in float64."""

from __future__ import annotations

import math

import mra_attention
import oracle
import pytest
import torch
from helpers import assert_same_selection, gqa, random_inputs, random_mask
from oracle import Settings
from torch import Tensor


def make_plan(query: Tensor, key: Tensor, settings: Settings) -> mra_attention.Plan:
    return mra_attention.plan(query, key, **settings.keywords(), **gqa(query, key))


def assert_selection(query: Tensor, key: Tensor, settings: Settings) -> Tensor:
    plan = make_plan(query, key, settings)
    expected = oracle.select(query, key, settings)
    actual = plan.block_mask()
    assert actual.dtype == torch.bool
    assert_same_selection(actual, expected)
    assert torch.equal(plan.num_blocks, expected.sum((-1, -2)))
    return actual


@pytest.mark.parametrize("block_size", [8, 12, 32, 128])
@pytest.mark.parametrize(
    ("query_length", "key_length"),
    [
        pytest.param(lambda b: 1, lambda b: 1, id="one"),
        pytest.param(lambda b: b - 1, lambda b: b + 1, id="around-one-block"),
        pytest.param(lambda b: 2 * b + 7, lambda b: 2 * b + 7, id="short-last-block"),
        pytest.param(lambda b: 9 * b, lambda b: 9 * b, id="whole-blocks"),
        pytest.param(lambda b: 3 * b + 1, lambda b: 17 * b - 3, id="long-keys"),
        pytest.param(lambda b: 11 * b + 5, lambda b: b, id="one-key-block"),
    ],
)
def test_lengths(block_size, query_length, key_length):
    shape = (2, 3, query_length(block_size), key_length(block_size), 5)
    query, key, *_ = random_inputs(shape)
    assert_selection(query, key, Settings(block_size=block_size, blocks_per_row=2.0))


@pytest.mark.parametrize("blocks_per_row", [1e-9, 0.3, 1.0, 1.4, 1.5, 2.25, 4.0, 1e6], ids=str)
@pytest.mark.parametrize("query_length", [40, 56, 61])
def test_budget_rounds_half_up_and_stays_between_forced_and_live(blocks_per_row, query_length):
    query, key, *_ = random_inputs((1, 2, query_length, 90, 4))
    settings = Settings(block_size=8, blocks_per_row=blocks_per_row)
    selected = assert_selection(query, key, settings)
    nq, nk = selected.shape[-2:]
    assert (nq, nk) == (math.ceil(query_length / 8), 12)
    expected = min(max(math.floor(blocks_per_row * nq + 0.5), nq), nq * nk)
    assert selected.sum((-1, -2)).tolist() == [[expected, expected]]


@pytest.mark.parametrize("num_blocks", [1, 6, 7, 20, 59, 60, 61, 10**12])
def test_explicit_num_blocks_overrides_blocks_per_row(num_blocks):
    query, key, *_ = random_inputs((2, 2, 48, 80, 4))
    selected = assert_selection(query, key, Settings(block_size=8, num_blocks=num_blocks))
    assert (selected.sum((-1, -2)) == min(max(num_blocks, 6), 60)).all()


@pytest.mark.parametrize("first_blocks", [0, 1, 3, 100])
@pytest.mark.parametrize("diagonal_blocks", [0, 1, 2, 3, 6, 7, 100])
@pytest.mark.parametrize("lengths", [(80, 80), (41, 99), (99, 41)], ids=str)
def test_forced_blocks(first_blocks, diagonal_blocks, lengths):
    query, key, *_ = random_inputs((1, 2, *lengths, 4))
    settings = Settings(block_size=8, blocks_per_row=4.0, first_blocks=first_blocks, diagonal_blocks=diagonal_blocks)
    selected = assert_selection(query, key, settings)
    i = torch.arange(selected.shape[-2])[:, None]
    j = torch.arange(selected.shape[-1])
    if diagonal_blocks:
        assert selected[..., (i - j).abs() <= diagonal_blocks // 2].all()
    assert selected[..., (i < first_blocks) | (j < first_blocks)].all()


@pytest.mark.parametrize("lengths", [(64, 64), (61, 83)], ids=str)
def test_ties_take_the_lowest_block_first(lengths):
    query = torch.full((1, 2, lengths[0], 4), 0.5, dtype=torch.float64)
    key = torch.full((1, 2, lengths[1], 4), 2.0, dtype=torch.float64)
    selected = assert_selection(query, key, Settings(block_size=8, num_blocks=20))
    nq, nk = selected.shape[-2:]
    expected = torch.zeros(nq, nk, dtype=torch.bool)
    expected[:, 0] = True
    optional = (~expected).flatten().nonzero().flatten()[: 20 - nq]
    expected.view(-1)[optional] = True
    assert torch.equal(selected, expected.expand_as(selected))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_blocks", [1, 30, 47, 64, 100])
def test_ties_among_other_scores(seed, num_blocks):
    """Small integers and powers of two: pooled logits are exact in any order of summation, so ties are ties."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randint(-1, 2, (2, 2, 10, 4), generator=generator).double().repeat_interleave(8, 2)
    key = torch.randint(-1, 2, (2, 2, 12, 4), generator=generator).double().repeat_interleave(8, 2)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert_selection(query.to(dtype), key.to(dtype), Settings(block_size=8, num_blocks=num_blocks, scale=0.5))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", [0.05, 0.3, 0.8])
def test_masks_with_dead_blocks(seed, keep):
    query, key, *_ = random_inputs((3, 2, 75, 101, 4), seed=seed)
    settings = Settings(
        block_size=8,
        blocks_per_row=2.5,
        first_blocks=seed % 2,
        diagonal_blocks=seed,
        key_mask=random_mask(3, 101, seed=seed, keep=keep),
        query_mask=random_mask(3, 75, seed=seed + 100, keep=keep),
    )
    live = oracle.live_blocks(query, key, settings)
    if keep < 0.1:
        assert not live.all()
    selected = assert_selection(query, key, settings)
    rows, columns = selected.shape[2:]
    assert not selected[:, :, live.shape[2] :].any()
    assert not (selected & ~live[:, :, :rows, :columns]).any()


def test_all_masked():
    query, key, *_ = random_inputs((3, 2, 20, 30, 4))
    nothing = torch.zeros(3, 30, dtype=torch.bool)
    some = torch.ones(3, 20, dtype=torch.bool)
    for settings in (
        Settings(block_size=8, key_mask=nothing, diagonal_blocks=1),
        Settings(block_size=8, query_mask=~some, first_blocks=1),
    ):
        assert not assert_selection(query, key, settings).any()


def test_budget_counts_rows_with_a_valid_query():
    query, key, *_ = random_inputs((2, 1, 64, 64, 4))
    query_mask = torch.arange(64) < torch.tensor([[20], [64]])
    selected = assert_selection(query, key, Settings(block_size=8, blocks_per_row=2.0, query_mask=query_mask))
    assert selected.sum((-1, -2)).flatten().tolist() == [6, 16]


def test_padded_tokens_do_not_move_the_means():
    query, key, *_ = random_inputs((2, 2, 70, 70, 4))
    mask = random_mask(2, 70, seed=1)
    settings = Settings(block_size=8, blocks_per_row=2.0, key_mask=mask, query_mask=mask)
    poisoned = [x.masked_fill(~mask[:, None, :, None], math.nan) for x in (query, key)]
    assert torch.equal(assert_selection(query, key, settings), assert_selection(*poisoned, settings))


@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_grouped_query_heads(key_heads):
    query, key, *_ = random_inputs((2, 6, 75, 50, 8), key_heads=key_heads)
    selected = assert_selection(query, key, Settings(block_size=8, blocks_per_row=2.0))
    assert selected.shape == (2, 6, 10, 7)


@pytest.mark.parametrize("scale", [None, 0.0, 0.01, 3.0, -1.0])
def test_scale(scale):
    query, key, *_ = random_inputs((1, 2, 64, 72, 8))
    assert_selection(query, key, Settings(block_size=8, blocks_per_row=2.0, scale=scale))


def test_scores_are_relative_to_the_best_block_of_their_row():
    """A row whose logits are all low still competes: with one shared budget, absolute logits would starve it."""
    query = torch.tensor([10.0, 0.001]).repeat_interleave(8).double().view(1, 1, 16, 1)
    key = torch.tensor([1.0, 0.9, 0.8]).repeat_interleave(8).double().view(1, 1, 24, 1)
    selected = assert_selection(query, key, Settings(block_size=8, num_blocks=4, scale=1.0))
    assert selected[0, 0].tolist() == [[True, False, False], [True, True, True]]


@pytest.mark.parametrize("magnitude", [1e-160, 1e4, 1e150])
def test_extreme_magnitudes(magnitude):
    query, key, *_ = random_inputs((1, 2, 64, 72, 8))
    assert_selection(query * magnitude, key, Settings(block_size=8, blocks_per_row=2.0))


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_both_modes_select_alike(mode):
    query, key, *_ = random_inputs((1, 2, 64, 72, 8))
    plan = make_plan(query, key, Settings(block_size=8, mode=mode))
    assert torch.equal(plan.block_mask(), make_plan(query, key, Settings(block_size=8)).block_mask())


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_a_plan_can_be_used_again(mode):
    settings = Settings(block_size=8, mode=mode, blocks_per_row=2.0, diagonal_blocks=1)
    query, key, value, *_ = random_inputs((2, 2, 61, 72, 8), dtype=torch.float32)
    plan = make_plan(query, key, settings)
    reuse = {"resolutions": (8, 1), "mode": mode, "plan": plan}
    once = mra_attention.scaled_dot_product_attention(query, key, value, **settings.keywords())
    again = mra_attention.scaled_dot_product_attention(query, key, value, **reuse)
    assert torch.equal(once, again)

    other_query, other_key, other_value, *_ = random_inputs((2, 2, 61, 72, 8), seed=9)
    expected, _ = oracle.attention(other_query, other_key, other_value, plan.block_mask(), settings)
    actual = mra_attention.scaled_dot_product_attention(other_query, other_key, other_value, **reuse)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_plan_describes_itself():
    query, key, *_ = random_inputs((2, 3, 61, 90, 8))
    plan = make_plan(query, key, Settings(block_size=8, num_blocks=24))
    assert (plan.query_shape[2], plan.key_shape[2], plan.config.block_size) == (61, 90, 8)
    assert plan.block_mask().shape == (2, 3, 8, 12)
    assert plan.num_blocks.dtype == torch.int64
    assert plan.num_blocks.tolist() == [[24] * 3] * 2
    assert plan.density.is_floating_point()
    assert plan.density.tolist() == [[0.25] * 3] * 2


def test_plan_keeps_heads_and_items_apart():
    """The selection of a head is the one it makes alone."""
    query, key, *_ = random_inputs((3, 2, 61, 90, 8))
    settings = Settings(block_size=8, blocks_per_row=2.0)
    together = make_plan(query, key, settings).block_mask()
    for item in range(3):
        for head in range(2):
            alone = make_plan(query[item, head][None, None], key[item, head][None, None], settings).block_mask()
            assert torch.equal(together[item, head], alone[0, 0])


@pytest.mark.parametrize("number", [math.nan, -math.nan, math.inf, -math.inf, 1e38], ids=str)
def test_numbers_that_are_none_keep_the_budget(number):
    query, key, value = (torch.randn(1, 2, 64, 8) for _ in range(3))
    query[0, 0] = number
    key[0, 1, 5] = number
    plan = mra_attention.plan(query, key, resolutions=(8, 1), blocks_per_row=2.0)
    assert (plan.num_blocks == 16).all()
    assert plan.block_mask().any(-1).all()
    tiny = mra_attention.scaled_dot_product_attention(query, key, value, resolutions=(8, 1), blocks_per_row=0.1)
    assert tiny.shape == value.shape


def test_infinite_value_reaches_what_it_reaches_in_exact_attention():
    query, key, value = (torch.randn(1, 2, 64, 8) for _ in range(3))
    value[0, 0, 3, 3] = math.inf
    out = mra_attention.scaled_dot_product_attention(query, key, value, resolutions=(8, 1), num_blocks=64)
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert torch.equal(out.isfinite(), exact.isfinite())
    assert torch.equal(out.isnan(), exact.isnan())
