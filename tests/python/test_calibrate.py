"""`calibrate`: budgets for heads and settings for layers from what attention was given."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from pathlib import Path
from typing import Any

import mra_attention
import pytest
import torch
from helpers import FLOAT64_TOLERANCE, named
from mra_attention import MRAConfig, scaled_dot_product_attention
from mra_attention.analysis import AttentionCall, BudgetCurve, Calibration, calibrate
from mra_attention.analysis.budget_frontier import frontier
from torch import Tensor

LENGTH, DIM, BLOCK = 256, 16, 32
BLOCKS = LENGTH // BLOCK


def local_head() -> tuple[Tensor, Tensor]:
    """Queries and keys, (LENGTH, DIM), of a head in which each block of queries sees its own block of keys alone."""
    own = 20 * torch.eye(BLOCKS, DIM, dtype=torch.float64).repeat_interleave(BLOCK, 0)
    return own, own + torch.randn(LENGTH, DIM, dtype=torch.float64) / 10


def even_head() -> tuple[Tensor, Tensor]:
    """Those of a head that averages all values: the means of blocks are exact."""
    return torch.zeros(LENGTH, DIM, dtype=torch.float64), torch.randn(LENGTH, DIM, dtype=torch.float64)


def rough_head() -> tuple[Tensor, Tensor]:
    """Those of a head that sees less of what is farther away, and of single keys more: the more blocks, the better."""
    angles = math.pi / LENGTH * torch.arange(LENGTH, dtype=torch.float64)[:, None]
    places = 5 * torch.cat([angles.cos(), angles.sin()], 1)
    noise = torch.randn(2, LENGTH, DIM - 2, dtype=torch.float64)
    query, key = (torch.cat([places, some], 1) for some in noise)
    return query, key


def call(*heads: tuple[Tensor, Tensor], layer: str = "first", items: int = 1, **arguments: Any) -> AttentionCall:
    query, key = (torch.stack(tensors)[None].repeat(items, 1, 1, 1) for tensors in zip(*heads, strict=True))
    return AttentionCall(query, key, torch.randn_like(key), layer=layer, **arguments)


def three_layers() -> list[AttentionCall]:
    layers = {
        "first": (local_head(), rough_head()),
        "second": (rough_head(), even_head()),
        "third": (local_head(), local_head()),
    }
    return [call(*heads, layer=layer) for layer, heads in layers.items()]


def softmax_errors(of: AttentionCall, config: MRAConfig) -> Tensor:
    """The errors (B, H) of a config beside the softmax, written out."""
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) & of.is_causal
    logits = of.query @ of.key.mT / DIM**0.5
    exact = logits.masked_fill(hidden, -math.inf).softmax(-1) @ of.value
    out = scaled_dot_product_attention(of.query, of.key, of.value, is_causal=of.is_causal, config=config)
    return (out - exact).flatten(2).norm(dim=2) / exact.flatten(2).norm(dim=2)


def test_a_head_that_needs_more_blocks_gets_more():
    found = calibrate([call(local_head(), rough_head(), even_head())], target_error=0.05)
    local, rough, even = found.configs["first"].blocks_per_row
    assert local == even == 1.0
    assert rough >= 4.0


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_error_is_that_of_the_calls_and_meets_the_target(is_causal):
    calls = [
        call(local_head(), rough_head(), items=2, is_causal=is_causal),
        call(rough_head(), rough_head(), is_causal=is_causal),
        call(rough_head(), even_head(), layer="second", is_causal=is_causal),
    ]
    found = calibrate(calls, target_error=0.15)
    first, second = found.configs["first"], found.configs["second"]
    of_first = torch.cat([softmax_errors(of, first) for of in calls[:2]]).mean(0)
    expected = torch.cat([of_first, softmax_errors(calls[2], second).mean(0)])
    errors = torch.tensor([e for layer in found.layers.values() for e in layer.errors], dtype=torch.float64)
    assert (errors - expected).abs().max() < FLOAT64_TOLERANCE
    assert abs(found.error - expected.mean()) < FLOAT64_TOLERANCE
    assert 0.0 < found.error <= 0.15


def test_costs_are_the_products_of_attention():
    found = calibrate([call(local_head(), rough_head(), items=3)], speedup=1)
    for budget, cost in zip(found.curves[0].budgets, found.curves[0].costs, strict=True):
        exact = min(budget, BLOCKS) / BLOCKS * LENGTH**2
        pooled = BLOCKS**2 if budget < BLOCKS else 0
        kept = pooled - min(budget, BLOCKS) * BLOCKS
        products = 2 * exact + pooled + max(kept, 0)  # logits and values; of blocks to choose from, and of those left
        assert cost == 2 * 3 * DIM * products, budget
    assert found.exact_cost == 3 * 2 * 4 * DIM * LENGTH**2
    assert found.cost_unit == "flops"


def test_budgets_that_are_tried():
    for budgets, expected in ((None, (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)), ([2, 5.0, 99], (2.0, 5.0))):
        found = calibrate([call(local_head(), rough_head())], target_error=0.1, budgets=budgets)
        assert {curve.budgets for curve in found.curves} == {(*expected, BLOCKS)}
        assert set(found.configs["first"].blocks_per_row) <= {*expected, BLOCKS}


def test_costs_in_seconds_choose_as_well():
    found = calibrate([call(local_head(), rough_head())], target_error=0.1, cost="seconds")
    assert found.cost_unit == "seconds"
    assert 0.0 < found.cost < 10.0
    assert found.error <= 0.1


def test_a_higher_demand_costs_more():
    calls = three_layers()
    by_error = [calibrate(calls, target_error=target) for target in (0.2, 0.1, 0.05, 0.01, 0.0)]
    for less, more in itertools.pairwise(by_error):
        assert less.cost < more.cost
        assert less.error > more.error
    by_speedup = [calibrate(calls, speedup=target) for target in (2.0, 3.0, 4.0, 6.0)]
    for target, found in zip((2.0, 3.0, 4.0, 6.0), by_speedup, strict=True):
        assert found.speedup >= target
    for slower, faster in itertools.pairwise(by_speedup):
        assert slower.cost > faster.cost
        assert slower.error < faster.error


def test_where_nothing_may_be_lost_every_block_is_computed_that_is_needed():
    found = calibrate(
        [call(rough_head(), rough_head()), call(rough_head(), even_head(), layer="second")], target_error=1e-9
    )
    assert found.configs["first"].blocks_per_row == math.inf
    assert found.error < FLOAT64_TOLERANCE
    rough, _ = found.configs["second"].blocks_per_row
    assert rough == BLOCKS, "infinity would give the other head's plan as much room"


def curves(layer: str, config: MRAConfig, heads: int, budgets: int) -> list[BudgetCurve]:
    steps = torch.rand(heads, 2, budgets).cumsum(2).tolist()
    ladder = tuple(map(float, range(budgets)))
    return [
        BudgetCurve(layer, head, config, ladder, tuple(-x for x in steps[head][0]), tuple(steps[head][1]))
        for head in range(heads)
    ]


def test_no_combination_of_budgets_and_settings_is_better():
    layers = [[curves(layer, config, 2, 4) for config in (MRAConfig(), MRAConfig(mode="sparse"))] for layer in "ab"]
    found = frontier(layers)
    of_layers = []
    for of_layer in layers:
        places = (zip(*choice, strict=True) for choice in of_choices(of_layer))
        of_layers.append([tuple(map(sum, choice)) for choice in places])
    combinations = [tuple(map(sum, zip(*pair, strict=True))) for pair in itertools.product(*of_layers)]
    assert len(combinations) == (2 * 4**2) ** 2
    assert len(found) > 5
    for point in found:
        better = [c for c in combinations if c[0] <= point.cost + 1e-12 and c[1] < point.error - 1e-12]
        assert not better, point
        assert any(c == pytest.approx(point[:2]) for c in combinations)
    assert found[-1].error == pytest.approx(min(c[1] for c in combinations))
    assert found[0].cost == pytest.approx(min(c[0] for c in combinations))
    for cheaper, better in itertools.pairwise(found):
        changed = sum(a != b for a, b in zip(cheaper.choice, better.choice, strict=True))
        assert changed == 1, "one layer takes a step"


def of_choices(of_layer: list[list[BudgetCurve]]) -> list[list[tuple[float, float]]]:
    """For every config and every budget of every head: cost and error of each head."""
    found = []
    for of_config in of_layer:
        points = [list(zip(curve.costs, curve.errors, strict=True)) for curve in of_config]
        found.extend([list(heads) for heads in itertools.product(*points)])
    return found


def test_loss_is_met_at_the_least_cost_by_few_runs():
    calls = three_layers()
    tried: list[dict[str, MRAConfig]] = []

    def loss(configs: dict[str, MRAConfig]) -> float:
        tried.append(configs)
        errors = [softmax_errors(of, configs[of.layer]).mean().item() for of in calls]
        return 2.0 + sum(errors) / len(errors)

    found = calibrate(calls, target_loss=2.1, loss=loss)
    assert found.configs in tried
    assert len(tried) <= 8
    # Here the loss is 2 more than the mean error, as all layers have as many heads.
    assert found.layers == calibrate(calls, target_error=0.1).layers
    assert found.loss == pytest.approx(2.0 + found.error, abs=FLOAT64_TOLERANCE)
    with pytest.raises(ValueError, match=r"target_loss=1.5 is not met .* 2"):
        calibrate(calls, target_loss=1.5, loss=loss)


def test_a_layer_takes_the_candidate_that_serves_it_best():
    candidates = [MRAConfig(), MRAConfig(resolutions=(16, 1)), MRAConfig(coarse="first_order")]
    calls = [call(local_head(), local_head()), call(even_head(), even_head(), layer="second")]
    # Keys that differ within blocks as the queries tell them apart: the means say nothing of them.
    rows = torch.randn(BLOCK, DIM, dtype=torch.float64).repeat(BLOCKS, 1)
    calls.append(call((3 * torch.ones(LENGTH, DIM, dtype=torch.float64), rows), layer="third"))
    found = calibrate(calls, target_error=0.01, candidates=candidates)
    assert found.configs["first"].resolutions == (32, 1)
    assert found.configs["second"].resolutions == (16, 1), "as good, and one block is less"
    assert found.configs["third"].coarse == "first_order"
    assert len(found.curves) == 3 * (2 + 2 + 1)


def test_calibrations_are_stored_as_json():
    candidates = [MRAConfig(local_blocks=2), MRAConfig(resolutions=(16, 1), pool_queries=False)]
    for found in (
        calibrate(three_layers(), target_error=0.05, candidates=candidates),
        calibrate(three_layers(), target_loss=0.0, loss=lambda _: -1.0),
    ):
        assert Calibration.from_json(found.to_json()) == found


def test_the_table_has_a_row_for_each_layer():
    calls = [call(rough_head(), rough_head()), call(local_head(), rough_head(), layer="second")]
    found = calibrate(calls, target_error=0.05, candidates=[MRAConfig(first_blocks=1)])
    header, first, second, total = str(found).splitlines()
    assert header.split() == ["layer", "settings", "blocks", "per", "row", "error", "cost"]
    assert first.startswith("first   blocks of 32, first_blocks=1  ")
    budgets = " ".join(f"{budget:g}" for budget in found.configs["second"].blocks_per_row)
    layer = found.layers["second"]
    for part in (budgets, f"{sum(layer.errors) / 2:.3f}", f"{layer.cost / layer.exact_cost:.1%} of exact"):
        assert part in second
    assert f"{found.error:.3f}" in total
    assert f"{1 / found.speedup:.1%} of exact" in total


def test_the_example_of_the_document_runs():
    text = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text()
    (section,) = (section for section in text.split("\n## ") if section.startswith("Budgets from data"))
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["calibration"].speedup >= 2
    assert {type(layer.self_attn) for layer in names["model"].layers} == {mra_attention.nn.MultiheadAttention}


def test_configs_serve_converted_models():
    encoder = torch.nn.TransformerEncoderLayer(2 * DIM, 2, batch_first=True)
    model = torch.nn.TransformerEncoder(encoder, num_layers=2).eval()
    names = [f"layers.{i}.self_attn" for i in range(2)]
    found = calibrate([call(local_head(), rough_head(), layer=name) for name in names], speedup=2)
    assert len(found.configs[names[0]].blocks_per_row) == 2
    converted = mra_attention.nn.convert(model, layers=found.configs)
    assert {name: module.config for name, module in converted.items()} == found.configs
    assert model(torch.randn(1, LENGTH, 2 * DIM)).isfinite().all()


def test_what_is_refused():
    good = call(local_head(), rough_head())
    target = {"target_error": 0.1}
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        ([good], {}, ValueError, "exactly one of target_error, speedup, target_loss must be given, got none"),
        ([good], {"target_error": 0.1, "speedup": 2}, ValueError, "got target_error and speedup"),
        ([good], {"target_error": -0.1}, ValueError, "target_error must be a finite number of at least 0, got -0.1"),
        ([good], {"target_error": "0.1"}, TypeError, "target_error must be .*, got '0.1'"),
        ([good], {"speedup": 0.5}, ValueError, "speedup must be a finite number of at least 1, got 0.5"),
        ([good], {"speedup": math.inf}, ValueError, "speedup must be .*, got inf"),
        ([good], {"speedup": 1000}, ValueError, "speedup=1000.0 is more than the smallest budgets give, which is 7.94"),
        ([good], {"target_loss": math.nan, "loss": len}, ValueError, "target_loss must be a finite number, got nan"),
        ([good], {"target_loss": 1.0}, TypeError, "target_loss needs loss, .*, got None"),
        ([good], target | {"loss": len}, ValueError, "loss goes with target_loss, not with target_error"),
        ([good], target | {"cost": "time"}, ValueError, "cost must be 'flops' or 'seconds', got 'time'"),
        ([good], target | {"candidates": []}, TypeError, "candidates must be a sequence of at least one"),
        ([good], target | {"candidates": [32]}, TypeError, "candidates must be .*, got 32 among them"),
        ([good], target | {"candidates": [MRAConfig(blocks_per_row=8)]}, ValueError, "blocks_per_row=8.0, but"),
        ([good], target | {"candidates": [MRAConfig(num_blocks=8)]}, ValueError, "num_blocks=8, but"),
        ([good], target | {"candidates": [MRAConfig(resolutions="auto")]}, ValueError, "got resolutions='auto'"),
        ([good], target | {"candidates": [MRAConfig(resolutions=(64, 16, 1))]}, ValueError, r"resolutions=\(64, 16, 1"),
        ([good], target | {"budgets": []}, TypeError, r"budgets must be None or a sequence of numbers, got \[\]"),
        ([good], target | {"budgets": 4}, TypeError, "budgets must be .*, got 4"),
        ([good], target | {"budgets": [4, 2]}, ValueError, r"budgets must be positive and ascending, got \[4, 2\]"),
        ([good], target | {"budgets": [0, 4]}, ValueError, r"budgets must be positive .*, got \[0, 4\]"),
        ([good], target | {"budgets": [4, math.inf]}, ValueError, r"budgets\[1\] must be a finite number, got inf"),
        ([], target, ValueError, "calls is empty"),
        (good, target, TypeError, "calls must be a sequence of .*AttentionCall, got AttentionCall"),
        ([good.query], target, TypeError, "calls must be of .*AttentionCall, got Tensor"),
        ([good, dataclasses.replace(good, layer="")], target, ValueError, r"calls\[1\].layer is empty"),
        ([good, call(local_head())], target, ValueError, r"'first' have different numbers of heads: \[1, 2\]"),
        (
            [dataclasses.replace(good, value=good.value / 0)],
            target,
            ValueError,
            "'first' have outputs that are not fin",
        ),
        ([dataclasses.replace(good, query_rows=torch.arange(9))], target, ValueError, "'first' has 9 of 256 queries"),
    ]
    for calls, arguments, error, message in cases:
        with named((arguments, message)), pytest.raises(error, match=message):
            calibrate(calls, **arguments)
