"""What a token ranks blocks by, and how much the others count: docs/definitions.md, sections 3.6 and 4.1."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from helpers import assert_close, assert_matches_oracle, assert_same_selection, block_mask, named, random_inputs
from mra_attention import KVCache, plan, scaled_dot_product_attention
from oracle import Settings

# (Lq, Lk, D), block size, blocks of each token: one and several lines of keys, channels that fill no group, and groups
# that are left out.
SELECTIONS = [
    ((9, 300, 3), 8, 4),
    ((9, 301, 64), 16, 5),
    ((7, 700, 70), 24, 6),
    ((5, 900, 140), 32, 5),
    ((5, 1100, 130), 40, 5),
    ((3, 3000, 66), 128, 4),
]


@pytest.mark.parametrize("shape", SELECTIONS, ids=str)
def test_the_selection_is_that_of_the_definition(shape):
    (queries, keys, dim), size, blocks = shape
    query, key, *_ = random_inputs((1, 4, queries, keys, dim), key_heads=2)
    # Channels of unlike sizes, or any groups would do.
    key = key * torch.linspace(0.2, 2.0, dim, dtype=key.dtype)
    for more in ({"scale": None}, {"scale": -0.3}, {"softcap": 1.5, "alibi_slopes": torch.full((4,), 1e-4)}):
        settings = Settings(block_size=size, blocks_per_row=blocks, score="max", lower_right=True, **more)
        with named(more):
            chosen = block_mask(query, key, settings)
            assert_same_selection(chosen, oracle.select(query, key, settings))
            by_means = block_mask(query, key, Settings(**(vars(settings) | {"score": "mean"})))
            assert not torch.equal(chosen, by_means)


# (Lq, Lk, D), block sizes, blocks of each token at each level.
LADDERS = [
    ((9, 300, 3), (32, 8), (4, 4)),
    ((9, 601, 64), (64, 16), (4, 5)),
    ((7, 1300, 70), (96, 24), (4, 5)),
    ((5, 2100, 140), (256, 64, 16), (3, 4, 5)),
    ((5, 3900, 66), (320, 32), (3, 6)),
    ((3, 600, 12), (128, 4), (3, 9)),
    ((4, 2000, 12), (512, 64, 4), (3, 6, 40)),
]


@pytest.mark.parametrize("shape", LADDERS, ids=str)
def test_every_level_of_a_ladder_is_chosen_by_the_definition(shape):
    (queries, keys, dim), sizes, blocks = shape
    query, key, *_ = random_inputs((1, 4, queries, keys, dim), key_heads=2)
    key = key * torch.linspace(0.2, 2.0, dim, dtype=key.dtype)
    key = key + 1.5 * torch.randn(dim, dtype=key.dtype)  # a block without a valid key would stand out, with a mean of 0
    valid = torch.rand(1, keys) < 0.9
    valid[:, 40:80] = valid[:, 200:250] = False
    budget = tuple(map(float, blocks))
    for more in ({"lower_right": True}, {"scale": -0.3, "pool_queries": False, "key_mask": valid}):
        settings = Settings(coarser=sizes[:-1], block_size=sizes[-1], blocks_per_row=budget, score="max", **more)
        with named(more):
            chosen = block_mask(query, key, settings)
            assert_same_selection(chosen, oracle.select(query, key, settings))
            by_means = block_mask(query, key, Settings(**(vars(settings) | {"score": "mean"})))
            assert not any(torch.equal(a, b) for a, b in zip(chosen, by_means, strict=True))


def test_one_key_that_matters_is_found_behind_a_mean_that_does_not():
    query, key, *_ = random_inputs((1, 1, 1, 640, 64), magnitude=0.1, dtype=torch.float32)
    direction = query[0, 0, 0] / query.norm()
    key[0, 0] += 0.1 * direction
    key[0, 0, 300] += 2 * direction
    key[0, 0, 301] -= 6 * direction
    made = {
        score: plan(30 * query, key, score=score, blocks_per_row=8, pool_queries=False) for score in ("mean", "max")
    }
    assert {score: bool(chosen.block_mask()[0, 0, 0, 300 // 32]) for score, chosen in made.items()} == {
        "mean": False,
        "max": True,
    }


@pytest.mark.threads(3)
def test_any_number_of_threads_gives_the_same_bits():
    query, key, value, *_ = random_inputs((2, 4, 600, 600, 40), key_heads=2, dtype=torch.float32)
    settings: dict[str, Any] = {"score": "max", "coarse_shift": 0.8, "is_causal": True, "enable_gqa": True}
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(scaled_dot_product_attention(query, key, value, resolutions=(8, 1), **settings))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_query_alone_chooses_as_it_does_among_others():
    """The codes of all keys are stored for many queries; for one those of its candidates are made."""
    query, key, value, *_ = random_inputs((1, 2, 500, 500, 70), dtype=torch.float32)
    settings: dict[str, Any] = {"resolutions": (8, 1), "score": "max", "blocks_per_row": 5}
    whole = scaled_dot_product_attention(query, key, value, is_causal=True, **settings)
    cache = KVCache(1, 2, 70, config=None, **settings)
    cache.append(key[:, :, :499], value[:, :, :499])
    cache.append(key[:, :, 499:], value[:, :, 499:])
    assert torch.equal(cache.attend(query[:, :, 499:]), whole[:, :, 499:])
    cache.crop(300)
    assert torch.equal(cache.attend(query[:, :, 299:300]), whole[:, :, 299:300])


@pytest.mark.parametrize("form", [{}, {"is_causal": True}], ids=["block", "token"])
def test_without_a_choice_the_settings_make_no_difference(form):
    query, key, value, *_ = random_inputs((1, 2, 100, 100, 12), dtype=torch.float32)
    more: dict[str, Any] = {"blocks_per_row": math.inf, **form}
    usual = scaled_dot_product_attention(query, key, value, **more)
    assert torch.equal(usual, scaled_dot_product_attention(query, key, value, score="mean", coarse_shift=2.0, **more))
    few: dict[str, Any] = {"resolutions": (8, 1), **form}
    chosen = plan(query, key, **few)
    usual = scaled_dot_product_attention(query, key, value, plan=chosen, mode="sparse", **form)
    shifted = scaled_dot_product_attention(query, key, value, plan=chosen, mode="sparse", coarse_shift=2.0, **form)
    assert torch.equal(usual, shifted)


def test_the_block_form_ranks_by_means():
    query, key, value, *_ = random_inputs((1, 2, 200, 200, 12), dtype=torch.float32)
    few: dict[str, Any] = {"resolutions": (8, 1), "blocks_per_row": 3}
    usual = scaled_dot_product_attention(query, key, value, **few)
    assert torch.equal(usual, scaled_dot_product_attention(query, key, value, score="mean", **few))


def test_a_shift_is_a_factor_of_what_a_coarse_block_counts():
    """Two blocks of zeros, the second one coarse: 8 keys that count 3 times each."""
    query, key = torch.zeros(1, 1, 1, 4, dtype=torch.float64), torch.zeros(1, 1, 16, 4, dtype=torch.float64)
    value = torch.cat([torch.zeros(8, 1), torch.ones(8, 1)]).double()[None, None]
    out, lse = scaled_dot_product_attention(
        query,
        key,
        value,
        resolutions=(8, 1),
        blocks_per_row=1,
        pool_queries=False,
        coarse_shift=math.log(3),
        return_lse=True,
    )
    assert_close(out.flatten(), torch.tensor([24 / 32], dtype=torch.float64), "out")
    assert_close(lse.flatten(), torch.tensor([math.log(32)], dtype=torch.float64), "lse")


@pytest.mark.parametrize("form", [{}, {"is_causal": True}, {"window": (40, 30)}], ids=["block", "token", "window"])
def test_outputs_and_gradients_of_both_settings(form):
    inputs = random_inputs((2, 4, 90, 90, 12), key_heads=2, value_dim=5)
    settings = Settings(block_size=8, blocks_per_row=3.0, score="max", coarse_shift=0.8, **form)
    assert_matches_oracle(*inputs[:3], settings, *inputs[3:])
