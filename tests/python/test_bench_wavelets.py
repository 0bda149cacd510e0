"""The analysis of pretrained models, without these models: statistics, errors, a small run, and the page about it."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOAT64_TOLERANCE
from mra_attention.analysis import AttentionCall, Record, Table
from test_bench_models import Words, tiny_gemma

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest.importorskip("pywt")
transformers = pytest.importorskip("transformers")
np = pytest.importorskip("numpy")

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def module(benchmark: Callable[[str], ModuleType]) -> Callable[[str], ModuleType]:
    """Import a module of this benchmark by its name."""
    return lambda name: benchmark(f"wavelets.{name}")


def test_rank_correlation_of_known_cases(module):
    statistics = module("statistics")
    x = np.array([1.0, 2.0, 2.0, 3.0])
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4.
    assert statistics.correlation(x, np.array([10.0, 30.0, 20.0, 40.0])).value == pytest.approx(
        4.5 / math.sqrt(4.5 * 5)
    )
    several = np.random.default_rng(0).normal(size=30)
    for y, expected in ((np.exp(several), 1.0), (-(several**3), -1.0)):
        found = statistics.correlation(several, y)
        assert (found.value, found.low, found.high) == pytest.approx((expected,) * 3)
    missing = np.append(several, np.nan)
    assert statistics.correlation(missing, np.append(several, 9.0)).value == pytest.approx(1.0)
    assert math.isnan(statistics.correlation(several, np.ones(30)).value)
    infinite = np.where(several > 0.0, np.inf, several)
    assert statistics.correlation(infinite, np.minimum(several, 0.0)).value == pytest.approx(1.0)
    assert statistics.mean(infinite).low == math.inf
    assert math.isnan(statistics.correlation(np.array([]), np.array([])).value)


def test_within_groups_what_differs_between_them_does_not_count(module):
    statistics = module("statistics")
    layers = np.repeat([3, 1, 2], 10)
    x = np.random.default_rng(0).normal(size=30)
    shifted = -x + 100 * layers
    assert statistics.correlation(x + 100 * layers, shifted).value > 0.5
    within = statistics.correlation(x + 100 * layers, shifted, groups=layers)
    assert (within.value, within.low, within.high) == pytest.approx((-1.0, -1.0, -1.0))
    assert math.isnan(statistics.correlation(x, shifted, groups=np.arange(30)).value), "nothing to compare within"


def test_intervals(module):
    statistics = module("statistics")
    pair = statistics.mean(np.array([0.0, 1.0, np.nan]))
    assert (pair.value, pair.low, pair.high) == (0.5, 0.0, 1.0), "each of 0 and 1 in a quarter of the samples"
    x = np.random.default_rng(0).normal(size=400)
    found = statistics.mean(x)
    half = 1.96 * x.std() / 20
    # The 50 samples beyond an end make it uncertain by 1/7 of a density; 15 % is more than three times that.
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half), rel=0.15)
    noise = np.random.default_rng(1).normal(size=(3, 400))
    y = x + 0.1 * noise[0]
    assert statistics.lead(x, noise[1], y).low > 0.5
    assert statistics.lead(noise[1], x, y).high < -0.5
    assert statistics.lead(x, -x, y).value == pytest.approx(0.0), "sizes count"


def test_what_the_best_blocks_leave(module):
    left_out = module("prediction").left_out
    eye = torch.eye(96, dtype=torch.float64)
    for pooled in (True, False):
        assert left_out(eye, 1, pooled=pooled) == (0.0, 0.0, 0.0)
    even = torch.full((96, 80), 1 / 80, dtype=torch.float64)
    left = left_out(even, 2, pooled=False)
    assert left == pytest.approx((16 / 80, 0.0, 0.0), abs=FLOAT64_TOLERANCE), "the last block has 16 keys"
    assert left_out(even, 9, pooled=False) == (0.0, 0.0, 0.0)
    # Rows of blocks look at the last block, at two of them, at all three alike: three blocks are kept.
    weights = torch.zeros(96, 96, dtype=torch.float64)
    weights[:32, 64:] = 1 / 32
    weights[32:64, :32] = 0.01 * torch.eye(32)
    weights[32:64, 32:64] = 0.99 / 32
    weights[64:] = 1 / 96
    # What is left of the diagonal: 1/32 of it is where its mean is.
    missed, misplaced = (0.01 + 2 / 3) / 3, 0.01 * 31 / 32 / 3
    detail = math.sqrt(0.01**2 * 31 / (1 + 32 * 0.01**2 + 0.99**2 + 1 / 3))
    assert left_out(weights, 1, pooled=True) == pytest.approx((missed, misplaced, detail))
    assert left_out(weights, 1, pooled=False) == pytest.approx((missed, misplaced, detail))
    # The mean of a block is that of all of its queries, or of each.
    weights[32:64, :32] = 0.01 / 32 * (torch.arange(32) < 16)[:, None] * 2
    assert left_out(weights, 1, pooled=False).misplaced_share == pytest.approx(0.0, abs=FLOAT64_TOLERANCE)
    assert left_out(weights, 1, pooled=True).misplaced_share == pytest.approx(0.005 / 3)


@pytest.mark.parametrize("is_causal", [False, True])
def test_errors_are_those_of_each_head(module, is_causal):
    query = torch.randn(1, 4, 200, 8)
    key, value = torch.randn(2, 1, 2, 200, 8).unbind()
    calls = [AttentionCall(query + i, key, value, layer="layers.7", is_causal=is_causal) for i in range(2)]
    found = module("prediction").errors("x", calls, (2, 7))
    assert [(e.sequence, e.head, e.blocks) for e in found] == [
        (i, h, m) for i in (0, 1) for h in range(4) for m in (2, 7)
    ]
    for error in found:
        assert error.layer == 7
        assert error.blocks == 2 or (error.error < 1e-5 and error.missed_share == 0.0), "7 blocks are all"
    arguments = {"is_causal": is_causal, "enable_gqa": True}
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), **arguments)[0]
    ours = module("prediction").mra(query, key, value, blocks_per_row=2, **arguments)[0].double()
    expected = (ours - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    errors = [error.error for error in found if error.sequence == 0 and error.blocks == 2]
    assert errors == pytest.approx(expected.tolist(), abs=FLOAT64_TOLERANCE)
    assert module("prediction").by_head(found, "blocks").tolist() == [4.5] * 4


def test_signals_of_which_metrics_are_known(module):
    found = {signal.name: signal for signal in module("signals").signals()}
    # Hann's window leaves a constant the frequencies 0 and 1, with powers of 4 to 1.
    everywhere = found["all positions"]
    assert everywhere.frequency_selectivity == pytest.approx(4.0)
    assert everywhere.spectral_entropy == pytest.approx(math.log(5) - 0.8 * math.log(4))
    # 257 equal powers: 65 up to the frequency 64 of 256, 128 up to 192, 64 above.
    peak = found["one position"]
    assert (peak.low_share, peak.mid_share, peak.high_share) == pytest.approx((65 / 257, 128 / 257, 64 / 257))
    assert (peak.spectral_entropy, peak.positional_entropy) == pytest.approx((math.log(257), 0.0), abs=1e-9)
    assert everywhere.uncertainty_slack == pytest.approx(0.0, abs=1e-9)
    # Constants give 5/16 N^2, noise 3/16 N^2 over all frequencies, a quarter of it in the low band; a draw is off by
    # about 0.02, so the mean of 200 by 0.0015.
    assert found["noise, exponential"].low_share == pytest.approx((5 / 16 + 3 / 64) / (8 / 16), abs=0.01)
    for name in ("plateaus of random widths", "noise, exponential", "noise, its fourth power"):
        assert found[name].entropy_correlation < 0.0, name


def table(values, nulls):
    return Table(
        Record(f"layer.{i // 2}", i % 2, "low_share", value, {"shuffled": null})
        for i, (value, null) in enumerate(zip(values, nulls, strict=True))
    )


def test_effects_and_trends(module):
    trained = table([0.125, 0.375, 0.25, 0.75], [0.25, 0.25, 0.125, math.nan])
    columns = module("columns").columns(trained, table([0.0] * 4, [0.0] * 4))
    assert columns.layers.tolist() == [0, 0, 1, 1]
    assert columns.models() == ["trained", "shuffled", "untrained"]
    effects = {effect.model: effect for effect in module("effects").effects("x", columns)}
    assert effects["trained"].mean.value == pytest.approx(0.375)
    assert effects["shuffled"].difference.value == pytest.approx(0.125 / 3), "where there is a null model"
    assert effects["shuffled"].above == pytest.approx(2 / 3)
    assert math.isnan(effects["untrained"].explained.value)
    (trend, *_) = module("effects").trends("x", columns)
    # Ranks 1, 3, 2, 4 and 1.5, 1.5, 3.5, 3.5; distances to the means of layers are 1/8, 1/8, 1/4, 1/4.
    assert trend.level.value == pytest.approx(2 / math.sqrt(5 * 4))
    assert trend.spread.value == pytest.approx(1.0)


def tiny_bert():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertModel(transformers.BertConfig(vocab_size=100, initializer_range=0.5, **sizes)).eval()


@pytest.fixture
def tiny(module, monkeypatch, tmp_path):
    """The command, with small models and few resamples."""
    sources, main = module("sources"), module("__main__")
    monkeypatch.setattr(sources.minilm_model, "load", lambda: (tiny_bert(), Words()))
    monkeypatch.setattr(sources.gemma_model, "load", lambda cache: (tiny_gemma(), Words()))
    monkeypatch.setattr(module("statistics"), "RESAMPLES", 40)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # which the call sets, and the end of the test undoes
    arguments = ["--documents", "2", "--length", "200", "--rows", "6", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks.wavelets", *arguments])
    return main


def test_a_small_run(module, tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tiny.packages, "missing", lambda needed: None)
    assert tiny.main() == 0
    printed = capsys.readouterr().out
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[:3] == ["bands.png", "bound.png", "predictions.png"]
    assert (tmp_path / names[4]).read_text() in printed
    record = json.loads((tmp_path / names[3]).read_text(), parse_constant=lambda word: pytest.fail(word))
    groups = ["MiniLM", "Gemma, global layers", "Gemma, window layers", "Gemma, first 128 tokens"]
    heads = [(head["group"], head["layer"], head["head"]) for head in record["heads"]]
    layers = ((groups[0], 0), (groups[0], 1), (groups[1], 1), (groups[2], 0), (groups[3], 0), (groups[3], 1))
    assert heads == [(*layer, head) for layer in layers for head in (0, 1)]
    for group in groups:
        models = {row["model"] for row in record["effects"] if row["group"] == group}
        assert models == {"trained", "uniform", "random", "shuffled", "alibi", "untrained"}
    for group in groups[:3]:
        assert f"## Correlation with the error, every predictor: {group}" in printed
        predictors = {row["predictor"] for row in record["predictions"] if row["group"] == group}
        families = module("report").FAMILIES.values()
        assert {name for family in families for name in family} - predictors == set()


def test_what_is_missing_is_named_and_skipped(tiny, monkeypatch, capsys):
    monkeypatch.setattr(tiny.packages, "missing", lambda needed: f"pip install {len(needed)}")
    assert tiny.main() == 0
    assert capsys.readouterr().out.splitlines() == [
        "minilm: skipped, packages are missing. Install them with: pip install 2",
        "gemma: skipped, packages are missing. Install them with: pip install 4",
    ]


def test_the_first_tokens_have_the_attention_that_they_have_alone(module):
    tensors = torch.randn(3, 1, 2, 200, 8)
    call = AttentionCall(*tensors, is_causal=True)
    alone = module("sources").prefix(call)
    assert alone.query_length == 128
    arguments = {"is_causal": True, "blocks_per_row": math.inf}
    attention = module("prediction").mra
    whole = attention(call.query, call.key, call.value, **arguments)
    assert torch.equal(attention(alone.query, alone.key, alone.value, **arguments), whole[..., :128, :])
    with pytest.raises(ValueError, match="layer '' must be causal"):
        module("sources").prefix(AttentionCall(*tensors))


def test_an_untrained_model_is_the_same_each_time_and_draws_nothing(module):
    torch.manual_seed(1)
    model = tiny_bert()
    before = torch.get_rng_state()
    first, second = (module("sources").untrained(model) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    name = "encoder.layer.0.attention.self.query.weight"
    weights = [each.state_dict()[name] for each in (first, second, model)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_tables_of_a_page_are_replaced(module):
    with_tables = module("page").with_tables
    text = "# A page\n\n<!-- one: x -->\n\n| a |\n|---|\n\nText | here.\n\n<!-- two -->\n\n| b |\n"
    measured = {"one: x": "| new |\n|---|\n| 1 |", "three": "| no |"}
    replaced = with_tables(text, measured)
    assert replaced == text.replace("| a |\n|---|\n", "| new |\n|---|\n| 1 |\n")
    assert with_tables(text.replace("| a |\n|---|\n\n", ""), measured) == replaced, "where there is none yet"
    assert with_tables(replaced, measured) == replaced
    with pytest.raises(ValueError, match=r"tables \['one: x', 'two'\], and none of them was measured"):
        with_tables(text, {"three": ""})


def page() -> str:
    return (REPOSITORY / "docs" / "wavelets.md").read_text()


def record() -> str:
    return sorted((REPOSITORY / "benchmarks" / "record" / "wavelets").glob("*.md"))[-1].read_text()


def test_tables_of_the_page_are_those_of_the_record():
    tables = re.findall(r"(?:^\|.*\n)+", page(), re.MULTILINE)
    measured = [each for each in tables if "claim" not in each.splitlines()[0]]
    assert len(measured) > 5
    for each in measured:
        assert each in record()


def test_numbers_and_pictures_of_the_page_are_those_of_the_record():
    prose = re.sub(r"\]\(\S+\)|`[^`]*`|arXiv \S+", "", page())
    numbers = re.findall(r"(?<![\w.])[+-]?\d+\.\d+(?!\w|\.\d)", prose)
    assert numbers
    known = {number.lstrip("+-") for number in re.findall(r"[+-]?\d+\.\d+", record())}
    assert [number for number in numbers if number.lstrip("+-") not in known] == []
    pictures = re.findall(r"!\[[^]]*\]\((\S+)\)", page())
    assert len(pictures) == 3
    assert all((REPOSITORY / "docs" / picture).exists() for picture in pictures)
