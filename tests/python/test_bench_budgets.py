"""The benchmark of budgets: what is compared, what foretells errors, and a small run of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from mra_attention import MRAConfig
from mra_attention.analysis import AttentionCall, BudgetCurve

pytest.importorskip("tqdm")
np = pytest.importorskip("numpy")


@pytest.fixture
def module(benchmark: Callable[[str], ModuleType]) -> Callable[[str], ModuleType]:
    """Import a module of this benchmark by its name."""
    return lambda name: benchmark(f"budgets.{name}")


def curve(head: int, config: MRAConfig, scale: float) -> BudgetCurve:
    """A head with the error scale / m and the cost m at m blocks."""
    budgets = (1.0, 2.0, 4.0, 8.0, 16.0)
    errors = (*(scale / budget for budget in budgets[:-1]), 0.0)
    return BudgetCurve("first", head, config, budgets, errors, budgets)


def test_best_uniform_budget(module):
    compare = module("compare")
    plain, dear = MRAConfig(), MRAConfig(mode="sparse")
    heads = [curve(head, plain, scale) for head, scale in enumerate((1.0, 3.0))]
    dearer = [replace(each, config=dear, costs=tuple(2 * cost for cost in each.costs)) for each in heads]
    found = compare.best_uniform([[dearer, heads]], 2 / 3)
    # The mean error is 2 / m, so it takes 3 blocks in each of two heads.
    assert found.cost == pytest.approx(2 * 3)
    assert (found.less.config.blocks_per_row, found.more.config.blocks_per_row) == (2.0, 4.0)
    assert found.less.config.mode == "full"
    assert found.seconds({found.less.config: 1.0, found.more.config: 2.0}) == pytest.approx(1.5)


def test_ranks(module):
    spearman = module("predictors").spearman
    values = torch.tensor([3.0, 1.0, 7.0, 5.0])
    assert spearman(values, values.exp()) == pytest.approx(1.0)
    assert spearman(values, -values) == pytest.approx(-1.0)
    assert spearman(values, torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(0.6)  # 1 - 6 * 4 / (4 * 15)


def test_numbers_of_the_weights(module):
    predictors = module("predictors")
    logits = torch.tensor([0.0, 0.0, 1.0, 3.0, -math.inf, -math.inf]).expand(1, 1, 2, 6)
    exact = torch.tensor([True, True, False, False, False, False]).expand(1, 1, 2, 6)
    sample = predictors.Sample(logits.softmax(-1), logits, exact, 2)
    total = 2 + math.e + math.e**3
    assert predictors.NUMBERS["weight outside of exact blocks"](sample).item() == pytest.approx(1 - 2 / total)
    assert predictors.NUMBERS["variance of logits within the others"](sample).item() == pytest.approx(1.0)
    shares = np.array([1, 1, math.e, math.e**3]) / total
    entropy = -(shares * np.log(shares)).sum()
    assert predictors.NUMBERS["entropy of the weights"](sample).item() == pytest.approx(entropy)
    power = np.abs(np.fft.rfft(np.append(shares, [0, 0]) * np.hanning(6))) ** 2
    power /= power.sum()
    entropy = -(power * np.log(power)).sum()
    assert predictors.NUMBERS["entropy of their spectrum"](sample).item() == pytest.approx(entropy, rel=1e-5)
    assert predictors.NUMBERS["low share of their spectrum"](sample).item() == pytest.approx(power[0], rel=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_small_run(module, is_causal, monkeypatch):
    compare, predictors, report = module("compare"), module("predictors"), module("report")
    angles = math.pi / 512 * torch.arange(512)[:, None]
    places = 5 * torch.cat([angles.cos(), angles.sin()], 1).expand(1, 2, 512, 2)

    def calls() -> list[AttentionCall]:
        """Layers of which the heads see less of what is farther away, so that each further block counts for less."""
        noise = (torch.randn(3, 1, 2, 512, 6) for _ in range(2))
        layers = [(torch.cat([places, q], -1), torch.cat([places, k], -1), v) for q, k, v in noise]
        return [AttentionCall(*qkv, layer=f"layer {i}", is_causal=is_causal) for i, qkv in enumerate(layers)]

    def seconds(call: AttentionCall, configs: Sequence[MRAConfig], rounds: int) -> dict[MRAConfig, float]:
        assert set(timed(call, configs[:2], rounds)) == {*configs[:2]}
        return {config: sum(config.budgets()[0]) / len(config.budgets()[0]) for config in configs}

    timed = compare.thread_seconds
    monkeypatch.setattr(compare, "thread_seconds", seconds)  # what is chosen must not depend on time
    plain, small = MRAConfig(), MRAConfig(resolutions=(16, 1))
    settings = [plain, small, MRAConfig(coarse_shift=0.5)]
    case = module("data").Case("noise", calls(), calls(), plain, [plain, small], settings, (1, 2, 3, 4, 6, 8), (), 4)
    chosen_on, tested_on = (compare.curves_of(some, case) for some in (case.chosen_on, case.tested_on))
    case.targets = [sum(head.errors[3] for layer in chosen_on for head in layer[0]) / 4]  # that of 4 blocks of 32
    rows = compare.rows_of(case, chosen_on, tested_on, 1)
    assert [row.free for row in rows] == list(case.freedoms())
    for row in rows:
        assert 0.0 < row.error < 1.0
        assert max(row.saved, row.saved_alike, row.expected, row.expected_at_best) < 1.0
        assert row.saved_alike == pytest.approx(row.expected), "here a head costs just its share"
    foretold = predictors.rows_of(case, chosen_on, tested_on)
    assert all(-1.0 <= row.correlation <= 1.0 for row in foretold)
    assert report.comparison(rows, 1).count("\n| ") == 1 + len(rows)
    assert "| error with 4 |" in report.ranking(foretold, case.budget)
