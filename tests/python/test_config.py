"""MRAConfig: one value with every setting, equal to the keywords."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from typing import Any

import pytest
import torch
from mra_attention import KVCache, MRAConfig, can_run, plan, scaled_dot_product_attention, varlen_attention
from mra_attention.config import SETTINGS

OTHERS: dict[str, Any] = {
    "resolutions": (16, 1),
    "blocks_per_row": (1.0, 2.5),
    "num_blocks": 5,
    "mode": "sparse",
    "coarse": "first_order",
    "score": "mean",
    "coarse_shift": 0.5,
    "first_blocks": 2,
    "diagonal_blocks": 3,
    "local_blocks": 2,
    "pool_queries": False,
    "grid": (9, 11),
}
QUERY, KEY, VALUE = torch.randn(3, 1, 2, 100, 8).unbind()


def test_the_table_above_has_every_setting():
    assert tuple(OTHERS) == SETTINGS
    assert all(OTHERS[name] != getattr(MRAConfig(), name) for name in SETTINGS)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "grid"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_config_is_the_same_as_its_settings_in_every_entry_point(name, is_causal):
    settings: dict[str, Any] = {name: OTHERS[name]}
    config, starts = MRAConfig(**settings), [0, 30, 100]
    packed = [x[0].transpose(0, 1) for x in (QUERY, KEY, VALUE)]

    def results(cache_settings: dict[str, Any], **more: Any) -> list[torch.Tensor]:
        cache = KVCache(1, 2, 8, **cache_settings)
        cache.append(KEY, VALUE)
        return [
            scaled_dot_product_attention(QUERY, KEY, VALUE, is_causal=is_causal, **more),
            plan(QUERY, KEY, is_causal=is_causal, **more).data,
            varlen_attention(*packed, starts, starts, is_causal=is_causal, **more),
            cache.attend(QUERY),
            KVCache_of_blocks(config).attend(QUERY, **more),
        ]

    def KVCache_of_blocks(config: MRAConfig) -> KVCache:  # noqa: N802
        cache = KVCache(1, 2, 8, resolutions=config.resolutions)
        cache.append(KEY, VALUE)
        return cache

    by_keyword, by_config = results(settings, **settings), results({"config": config}, config=config)
    override = MRAConfig(**settings | {name: getattr(MRAConfig(), name)})
    both = results({"config": override} | settings, config=override, **settings)
    for a, b, c in zip(by_keyword, by_config, both, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert can_run(QUERY, KEY, VALUE, config=config) is None


def test_a_grid_in_a_config_is_one_as_a_keyword():
    few: dict[str, Any] = {"resolutions": (8, 1), "blocks_per_row": 1}
    config, other = MRAConfig(grid=(9, 11), **few), MRAConfig(grid=(2, 3), **few)

    def same(a: torch.Tensor, *others: torch.Tensor) -> list[bool]:
        return [torch.equal(a, b) for b in others]

    outputs = [
        scaled_dot_product_attention(QUERY, KEY, VALUE, grid=(9, 11), **few),
        scaled_dot_product_attention(QUERY, KEY, VALUE, config=config),
        scaled_dot_product_attention(QUERY, KEY, VALUE, config=other, grid=(9, 11)),
        scaled_dot_product_attention(QUERY, KEY, VALUE, config=config, grid=None),
    ]
    plans = [
        plan(QUERY, KEY, grid=(9, 11), **few),
        plan(QUERY, KEY, config=config),
        plan(QUERY, KEY, config=other, grid=(9, 11)),
        plan(QUERY, KEY, config=config, grid=None),
    ]
    assert same(*outputs) == same(*(selection.data for selection in plans)) == [True, True, False]
    assert can_run(QUERY, KEY, VALUE, config=config) is None


def test_configs_are_values():
    config = MRAConfig(**OTHERS)
    assert config == MRAConfig(**OTHERS)
    assert hash(config) == hash(MRAConfig(**OTHERS))
    assert config != MRAConfig()
    assert {config: 1}[MRAConfig(**OTHERS)] == 1
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert dataclasses.replace(config, mode="full").mode == "full"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.mode = "full"  # pyright: ignore[reportAttributeAccessIssue]
    assert repr(MRAConfig(blocks_per_row=2)).startswith("MRAConfig(resolutions=(32, 1), blocks_per_row=2.0, ")
    assert MRAConfig(resolutions=(64, 1)).block_size == 64


def test_one_spelling_of_equal_values():
    assert MRAConfig(resolutions=[16, 1], blocks_per_row=2) == MRAConfig(resolutions=(16, 1), blocks_per_row=2.0)
    assert hash(MRAConfig(grid=[9, 11])) == hash(MRAConfig(grid=(9, 11)))  # pyright: ignore[reportArgumentType]
    spelled = [(1, 2.5), [1.0, 2.5], torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.5], dtype=torch.float64)]
    assert len({MRAConfig(blocks_per_row=rates) for rates in spelled}) == 1


@pytest.mark.parametrize("settings", [{}, OTHERS, {"blocks_per_row": math.inf}, {"blocks_per_row": (math.inf, 1.5)}])
def test_to_json_and_back(settings):
    config = MRAConfig(**settings)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert tuple(json.loads(config.to_json(), parse_constant=refuse)) == SETTINGS
    assert MRAConfig.from_json(config.to_json()) == config
    assert MRAConfig.from_dict(config.to_dict()) == config
    assert json.loads(config.to_json()) == config.to_dict()


def test_what_is_left_out_has_its_default():
    assert MRAConfig.from_json('{"mode": "sparse"}') == MRAConfig(mode="sparse")
    assert MRAConfig.from_dict({}) == MRAConfig()


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ('{"modes": "full"}', TypeError, "'modes' is no argument and no setting; the settings are resolutions, "),
        ('{"mode": "dense"}', ValueError, "mode must be 'full' or 'sparse', got 'dense'"),
        ('{"blocks_per_row": "4"}', TypeError, "blocks_per_row must be a positive number, got '4'"),
        ('{"resolutions": [64, 8, 1], "blocks_per_row": [1, 2, 3]}', ValueError, "each of the 2 levels"),
        ("[1]", ValueError, r"text must be a JSON object of settings, got '\[1\]'"),
        ("{", ValueError, "Expecting property name"),
    ],
)
def test_what_is_no_config_is_refused(text, error, words):
    with pytest.raises(error, match=words):
        MRAConfig.from_json(text)


@pytest.mark.parametrize(
    ("given", "resolutions", "of"),
    [
        ({"blocks_per_row": (4, 8)}, (512, 32, 1), "head"),
        ({"resolutions": "auto", "blocks_per_row": (4, 8)}, [512, 32, 1], "head"),
        ({"resolutions": (512, 32, 1), "blocks_per_row": (4, 8)}, (32, 1), "level"),
        ({"resolutions": (512, 32, 1), "blocks_per_row": (4, 8)}, "auto", "level"),
        ({"resolutions": (512, 32, 1), "blocks_per_row": (4, 8)}, (512, 64, 8, 1), "level"),
    ],
)
def test_budgets_of_heads_do_not_become_budgets_of_levels(given, resolutions, of):
    config = MRAConfig(**given)
    words = rf"^resolutions=.* without blocks_per_row: .*\(4.0, 8.0\) is one budget for each {of} .*pass blocks_per_row"
    with pytest.raises(ValueError, match=words):
        plan(QUERY, KEY, config=config, resolutions=resolutions)
    plan(QUERY, KEY, config=config, resolutions=resolutions, blocks_per_row=4)
    plan(QUERY, KEY, config=MRAConfig(**given | {"blocks_per_row": 4}), resolutions=resolutions)


def test_budgets_keep_their_meaning_with_other_sizes_of_blocks():
    config, ladder = MRAConfig(blocks_per_row=(1, 2)), MRAConfig(resolutions=(64, 16, 1), blocks_per_row=(1, 2))
    for given, resolutions in ((config, (8, 1)), (config, "auto"), (ladder, (32, 8, 1))):
        by_override = plan(QUERY, KEY, config=given, resolutions=resolutions)
        assert torch.equal(by_override.data, plan(QUERY, KEY, blocks_per_row=(1, 2), resolutions=resolutions).data)


def test_rates_of_heads_are_those_of_each_head_alone():
    rates = (1.5, 3.0)
    for arguments in ({}, {"is_causal": True}, {"mode": "sparse"}, {"pool_queries": False}):
        settings: dict[str, Any] = {"resolutions": (8, 1)} | arguments
        out = scaled_dot_product_attention(QUERY, KEY, VALUE, blocks_per_row=rates, **settings)
        for head, rate in enumerate(rates):
            alone = (x[:, head : head + 1] for x in (QUERY, KEY, VALUE))
            assert torch.equal(
                out[:, head : head + 1], scaled_dot_product_attention(*alone, blocks_per_row=rate, **settings)
            )


def test_local_blocks_do_in_the_block_form_what_the_diagonal_does():
    """In the token form they cover it: no setting loses its meaning with the form."""
    given: dict[str, Any] = {"resolutions": (8, 1), "blocks_per_row": 1}
    chosen = plan(QUERY, KEY, local_blocks=3, **given).block_mask()
    rows = torch.arange(13)
    assert chosen[..., (rows[:, None] - rows).abs() < 3].all()
    assert torch.equal(chosen, plan(QUERY, KEY, diagonal_blocks=4, **given).block_mask())
