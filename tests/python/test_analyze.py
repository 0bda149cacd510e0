"""Tables of metrics beside null models: `analyze` against the metrics of rows taken one by one, and null models."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from mra_attention import analysis as m
from mra_attention.analysis import AttentionCall, AttentionMap, Record, Table, analyze

LENGTH, DIM = 40, 6
FEW = {"max_rows": None, "progress": False, "nulls": []}


def call_of(batch: int = 1, heads: int = 2, length: int = LENGTH, seed: int = 0, **given: Any) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)
    qkv = [torch.randn(batch, heads, length, DIM, generator=generator) for _ in range(3)]
    return AttentionCall(*qkv, **({"layer": "one", "is_causal": True} | given))


def value(table: Table, metric: str, head: int | None = 0, model: str = "value") -> float:
    (record,) = [x for x in table.to_records() if (x["metric"], x["head"]) == (metric, head)]
    return record[model]


def same(actual: Table, expected: Table) -> bool:
    """Equal bit for bit, NaN to NaN."""
    return repr(actual.to_records()) == repr(expected.to_records())


def test_every_metric_is_the_mean_over_rows():
    call = call_of()
    table = analyze([call], **FEW)
    rows = m.attention_map(call, 0, 1).numpy()
    spectrum = m.power_spectral_density(rows)
    coefficients = m.wavelet_coefficients(rows)
    seen, places = np.tril(np.ones((LENGTH, LENGTH), bool)), np.arange(LENGTH)
    local = m.local_share(rows, places).mean()
    positional, spectral = m.positional_entropy(rows), m.spectral_entropy(spectrum.power)
    expected = {
        # The first row is at the first token alone, where the window is 0, so it has no spectrum.
        "low_share": m.band_shares(spectrum)[1:, 0].mean(),
        "mid_share": m.band_shares(spectrum)[1:, 1].mean(),
        "frequency_selectivity": m.frequency_selectivity(spectrum)[1:].mean(),
        "spectral_entropy": spectral[1:].mean(),
        "high_share": m.band_shares(spectrum)[1:, 2].mean(),
        "positional_entropy": positional.mean(),
        "entropy_correlation": np.corrcoef(positional[1:], spectral[1:])[0, 1],
        "wavelet_energy_a3": m.wavelet_energy(coefficients)[:, 0].mean(),
        "wavelet_entropy_d3": m.wavelet_entropy(coefficients)[:, 1].mean(),
        "normalized_wavelet_entropy_d1": np.nanmean(m.wavelet_entropy(coefficients, normalize=True)[:, 3]),
        "scale_sensitivity_0.5": m.scale_sensitivity(rows, 0.5).mean(),
        "scale_sensitivity_0.25": m.scale_sensitivity(rows, 0.25).mean(),
        "reconstruction_error": m.reconstruction_error(rows, coefficients).mean(),
        "local_share": local,
        "local_global_ratio": local / (1 - local),
        "window_entropy_16": np.nanmean(m.window_entropy(rows, 16, visible=seen)),
        "window_entropy_32": np.nanmean(m.window_entropy(rows, 32, visible=seen)),
        "uncertainty_frequency_entropy": m.entropic_uncertainty(rows).frequency.mean(),
        "uncertainty_slack": m.entropic_uncertainty(rows).slack.mean(),
    }
    for name, number in expected.items():
        assert value(table, name, 1) == pytest.approx(number, rel=1e-12), name
    means = [value(table, "entropy_correlation", head) for head in (0, 1)]
    assert value(table, "entropy_correlation", None) == pytest.approx(sum(means) / 2, rel=1e-12)
    assert {x.metric for x in table} > set(expected)


def test_null_models_stand_beside_each_value():
    call = call_of(heads=4)
    table = analyze([call], max_rows=None, progress=False)
    assert table.nulls() == ["uniform", "random", "shuffled", "alibi"]
    number = np.arange(1, LENGTH + 1)
    assert value(table, "positional_entropy", 2, "uniform") == pytest.approx(np.log(number).mean(), rel=1e-12)
    shuffled, observed = (value(table, "positional_entropy", 2, x) for x in ("shuffled", "value"))
    assert shuffled == pytest.approx(observed, rel=1e-12)
    assert value(table, "spectral_entropy", 2, "shuffled") != value(table, "spectral_entropy", 2)
    ahead = np.arange(LENGTH) - np.arange(LENGTH)[:, None]
    decay = np.where(ahead <= 0, np.exp2(-6) * ahead, -np.inf)  # head 2 of 4 has the slope 2^(-8 3/4)
    decay = np.exp(decay) / np.exp(decay).sum(-1, keepdims=True)
    assert value(table, "positional_entropy", 2, "alibi") == pytest.approx(
        m.positional_entropy(decay).mean(), rel=1e-12
    )
    alone = analyze([AttentionMap(torch.tensor(decay)[None, None], visible=torch.tensor(ahead <= 0))], **FEW)
    for name in ("low_share", "wavelet_energy_d1", "uncertainty_slack", "local_share"):
        assert value(table, name, 2, "alibi") == pytest.approx(value(alone, name), rel=1e-9), name


def test_rows_that_are_looked_at():
    call = call_of()
    rows = m.attention_map(call, 0, 0).numpy()

    def entropy(**given: Any) -> float:
        return value(analyze([call], metrics=["entropies"], **(FEW | given)), "positional_entropy")

    assert entropy(first_row=30) == pytest.approx(m.positional_entropy(rows[30:]).mean(), rel=1e-12)
    chosen = [10, 19, 29, 39]
    assert entropy(first_row=10, max_rows=4) == pytest.approx(m.positional_entropy(rows[chosen]).mean(), rel=1e-12)
    assert entropy(max_rows=1) == pytest.approx(m.positional_entropy(rows[-1]), rel=1e-12)
    assert entropy(reduction="last") == pytest.approx(m.positional_entropy(rows[-1]), rel=1e-12)
    mean_row = m.positional_entropy(rows[8:].mean(0))
    assert entropy(reduction="mean", first_row=8) == pytest.approx(mean_row, rel=1e-12)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    mask[[5, -1]] = False
    blind = replace(call, attn_mask=mask)
    given = {"metrics": ["entropies"], **FEW}
    of_last = value(analyze([blind], reduction="last", **given), "positional_entropy")
    assert of_last == pytest.approx(m.positional_entropy(rows[-2]), rel=1e-12), "the last row that sees a key"
    of_mean = value(analyze([blind], reduction="mean", **given), "positional_entropy")
    seeing = np.delete(rows, [5, LENGTH - 1], 0)
    assert of_mean == pytest.approx(m.positional_entropy(seeing.mean(0)), rel=1e-12)
    with pytest.raises(ValueError, match="each head a query from first_row=0 on that sees a key"):
        analyze([replace(call, attn_mask=~torch.ones(LENGTH, LENGTH, dtype=torch.bool))], **FEW)
    kept = m.take_queries(call, torch.tensor(chosen))
    assert same(analyze([kept], **FEW), analyze([call], **(FEW | {"first_row": 10, "max_rows": 4})))


def test_padding_changes_nothing():
    call = call_of(length=LENGTH + 9, is_causal=False)
    mask = torch.ones(1, 1, 1, LENGTH + 9, dtype=torch.bool)
    for kept in (slice(0, LENGTH), slice(9, LENGTH + 9)):
        mask[:] = False
        mask[..., kept] = True
        alone = [x[:, :, kept] for x in (call.query, call.key, call.value)]
        padded = [x.masked_fill(~mask.mT, math.nan) for x in (call.query, call.key, call.value)]
        for causal in (False, True):
            expected = AttentionCall(*alone, layer="one", is_causal=causal)
            actual = AttentionCall(*padded, layer="one", is_causal=causal, attn_mask=mask)
            given = {"nulls": ["uniform", "shuffled", "alibi"], "max_rows": 16, "progress": False}
            one, two = analyze([actual], **given), analyze([expected], **given)
            np.testing.assert_allclose(
                [[x["value"], x["uniform"], x["shuffled"], x["alibi"]] for x in one.to_records()],
                [[x["value"], x["uniform"], x["shuffled"], x["alibi"]] for x in two.to_records()],
                rtol=1e-9,
                atol=1e-12,
            )
            for pairs in (mask & mask.mT, torch.where(mask, 0.0, -math.inf).expand(1, 2, *[LENGTH + 9] * 2)):
                assert same(analyze([replace(actual, attn_mask=pairs)], **given), one)
            assert not math.isnan(value(analyze([actual], nulls=["random"], progress=False), "low_share", 0, "random"))


def test_a_mask_of_queries_says_which_are_padding():
    call = call_of(is_causal=False)
    given = {"metrics": ["entropies"], **FEW}
    some, every = torch.arange(LENGTH)[None] < LENGTH - 7, torch.ones(1, LENGTH, dtype=torch.bool)
    kept = m.take_queries(call, torch.arange(LENGTH - 7))
    assert same(analyze([replace(call, query_padding_mask=some)], **given), analyze([kept], **given))
    mask = torch.ones(1, 1, 1, LENGTH, dtype=torch.bool)
    mask[..., -9:] = False
    cross = replace(call, attn_mask=mask)
    rows = m.attention_map(cross, 0, 0).numpy()
    found = analyze([replace(cross, query_padding_mask=every)], **given)
    assert value(found, "positional_entropy") == pytest.approx(m.positional_entropy(rows).mean(), rel=1e-12)


def test_sequences_of_a_layer_are_put_together():
    both = call_of(batch=2, heads=3)
    halves = [
        replace(both, query=both.query[i : i + 1], key=both.key[i : i + 1], value=both.value[i : i + 1]) for i in (0, 1)
    ]
    assert same(analyze(halves, **FEW), analyze(iter([both]), **FEW))
    other = replace(both, layer="two")
    table = analyze([halves[0], other, halves[1]], **FEW)
    assert same(table.select(layer="one"), analyze([both], **FEW))
    assert [x.layer for x in table.select(metric="low_share")] == ["one"] * 3 + ["two"] * 3


def test_short_sequences():
    """Of three tokens a quarter is none, so that metric is not defined; the others are."""
    table = analyze([call_of(length=3)], progress=False)
    assert math.isnan(value(table, "scale_sensitivity_0.25"))
    assert value(table, "wavelet_energy_a0") > 0.0
    assert math.isnan(value(analyze([call_of(length=1)], progress=False), "scale_sensitivity_0.5"))


def test_same_bits_for_the_same_seed():
    call = call_of()
    before = torch.get_rng_state(), np.random.get_state()[2]  # noqa: NPY002
    first, again, other = (analyze([call], seed=seed, progress=False) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[2] == before[1]  # noqa: NPY002
    assert same(first, again)
    changes = {x: value(first, "low_share", 0, x) != value(other, "low_share", 0, x) for x in ["value", *first.nulls()]}
    assert changes == {"value": False, "uniform": False, "random": True, "shuffled": True, "alibi": False}


def test_heads_sequences_and_sources_are_drawn_apart():
    one = call_of(heads=1)
    alike = replace(one, query=one.query.expand(2, 2, -1, -1), key=one.key.expand(2, 2, -1, -1))
    alike = replace(alike, value=one.value.expand(2, 2, -1, -1))
    given = {"metrics": ["band_shares"], "nulls": ["random", "shuffled"], "progress": False}
    tables = [analyze(calls, **given) for calls in ([one], [one, one], [alike])]
    for model in ("random", "shuffled"):
        shares = {value(table, "low_share", 0, model) for table in tables} | {value(tables[2], "low_share", 1, model)}
        assert len(shares) == 4, model
    assert value(tables[2], "low_share", 0) == value(tables[2], "low_share", 1)


def test_options_reach_the_functions():
    call = call_of()
    rows = m.attention_map(call, 0, 0).numpy()
    options: dict[str, dict[str, Any]] = {
        "power_spectral_density": {"window": None, "nfft": 64, "demean": True},
        "band_shares": {"edges": (0.5,)},
        "wavelet_coefficients": {"wavelet": "haar", "level": 2},
        "wavelet_energy": {"normalize": True},
        "scale_sensitivity": {"sampling": "stride", "compare": "truncate"},
        "local_share": {"window": 3},
        "window_entropy": {"weighting": "equal"},
    }
    table = analyze([call], options=options, **FEW)
    spectrum = m.power_spectral_density(rows, window=None, nfft=64, demean=True)
    haar = m.wavelet_coefficients(rows, wavelet="haar", level=2)
    seen = np.tril(np.ones((LENGTH, LENGTH), bool))
    sensitivity = m.scale_sensitivity(rows, 0.5, sampling="stride", compare="truncate", wavelet="haar", level=2)
    expected = {
        "band_0_share": m.band_shares(spectrum, edges=(0.5,))[:, 0],
        "wavelet_energy_d2": m.wavelet_energy(haar, normalize=True)[:, 1],
        "scale_sensitivity_0.5": sensitivity,
        "local_share": m.local_share(rows, np.arange(LENGTH), window=3),
        "window_entropy_16": m.window_entropy(rows, 16, visible=seen, weighting="equal"),
    }
    for name, samples in expected.items():
        assert value(table, name) == pytest.approx(np.nanmean(samples), rel=1e-12), name


def test_maps():
    call = call_of()
    weights = torch.stack([m.attention_map(call, 0, head) for head in (0, 1)])[None]
    given = AttentionMap(weights, "one", visible=torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())
    models = ["uniform", "shuffled", "alibi"]
    assert same(analyze([given], nulls=models, progress=False), analyze([call], nulls=models, progress=False))
    assert math.isnan(value(analyze([given], progress=False), "low_share", 0, "random"))
    with pytest.raises(ValueError, match="layer 'one' is an AttentionMap, which has none"):
        analyze([given], nulls=["random"], progress=False)


def test_maps_that_are_refused():
    weights = torch.rand(1, 1, 3, 3)
    with pytest.raises(ValueError, match="weights of layer 'x' are 0 above the diagonal; say by visible"):
        AttentionMap(weights.tril(), "x")
    AttentionMap(weights.tril(), "x", visible=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="hides pairs that have a weight"):
        AttentionMap(weights, visible=torch.ones(3, 3, dtype=torch.bool).tril())
    with pytest.raises(ValueError, match=r"must broadcast to \(1, 1, 3, 3\), got \(2, 3\)"):
        AttentionMap(weights, visible=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="visible of layer '' must be bool"):
        AttentionMap(weights, visible=torch.ones(3, 3))
    with pytest.raises(TypeError, match=r"floating point, got torch.int64"):
        AttentionMap(torch.ones(1, 1, 3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"must be \(B, H, Lq, Lk\), got \(3, 3\)"):
        AttentionMap(weights[0, 0])
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match="finite and not negative"):
            AttentionMap(weights.masked_fill(weights == weights.max(), wrong))


def test_shuffled_rows():
    rng = np.random.default_rng(0)
    seen = rng.random((6, 30)) < 0.7
    rows = np.where(seen, rng.random((6, 30)), 0.0)
    shuffled = m.shuffled_rows(rows, seen, np.random.default_rng(1))
    assert np.array_equal(np.sort(shuffled), np.sort(rows))
    assert not shuffled[~seen].any()
    assert (shuffled != rows).any(-1).all()
    assert np.array_equal(shuffled, m.shuffled_rows(rows, seen, np.random.default_rng(1)))
    # Each of 4 visible keys gets the one weight in a quarter of 4000 rows, give or take five standard deviations.
    seen = np.tile([True, False, True, True, True], (4000, 1))
    counts = m.shuffled_rows(seen * [1.0, 0, 0, 0, 0], seen, rng).sum(0)
    assert counts[1] == 0
    assert abs(counts[[0, 2, 3, 4]] - 1000).max() < 5 * math.sqrt(4000 * 0.25 * 0.75)


def test_random_call():
    call = call_of(heads=2, length=500)
    scaled = replace(call, query=call.query * torch.tensor([1.0, 7.0])[:, None, None])
    drawn = m.random_call(scaled, 5)
    assert torch.equal(drawn.query, m.random_call(scaled, 5).query)
    assert not torch.equal(drawn.query, m.random_call(scaled, 6).query)
    assert drawn.value is call.value
    assert drawn.is_causal
    # The mean square of n normal numbers has the relative standard deviation sqrt(2 / n); there are two of them.
    ratio = drawn.query.square().mean((-2, -1)) / scaled.query.square().mean((-2, -1))
    assert (ratio - 1).abs().max() < 5 * math.sqrt(2 / (500 * DIM))
    padded = torch.cat([scaled.query, torch.full((1, 2, 100, DIM), math.nan)], 2)
    filled = m.random_call(replace(scaled, query=padded, query_length=600), 5).query
    ratio = filled.square().mean((-2, -1)) / scaled.query.square().mean((-2, -1))
    assert (ratio - 1).abs().max() < 5 * math.sqrt(2 / (500 * DIM))
    assert (drawn.query * scaled.query).mean().abs() < 5 * 7 / math.sqrt(500 * DIM)


def test_random_call_of_a_padded_sequence():
    """The root mean square is that of valid tokens, whatever the padding holds."""
    call, valid = call_of(is_causal=False), torch.arange(LENGTH) < 25
    mask = valid[None, None, None]
    drawn = []
    for padding in (0.0, 7.0, math.nan):
        query, key = (x.masked_fill(~mask.mT, padding) for x in (call.query, call.key))
        drawn.append(m.random_call(replace(call, query=query, key=key, attn_mask=mask), 3))
    for other in drawn[1:]:
        assert torch.equal(drawn[0].query, other.query)
        assert torch.equal(drawn[0].key, other.key)
    whole = m.random_call(call, 3).query[0, 0]
    size = [x[0, 0].double().square().mean().sqrt() for x in (call.query[..., :25, :], call.query)]
    torch.testing.assert_close(
        drawn[0].query[0, 0], whole * (size[0] / size[1]).float(), rtol=4 * torch.finfo().eps, atol=0.0
    )


def test_table(tmp_path):
    records = [Record("a", 0, "x", 0.1, {"uniform": math.inf}), Record("b", None, "y", math.nan, {"uniform": 2.0})]
    table = Table(records)
    assert (len(table), table[0], table[-1].layer) == (2, records[0], "b")
    assert isinstance(table[:1], Table)
    assert repr(table) == "Table(2 records: 2 layers, 2 metrics; null models ['uniform'])"
    assert table.to_records()[0] == {"layer": "a", "head": 0, "metric": "x", "value": 0.1, "uniform": math.inf}
    assert [x.layer for x in table.select(layer="a", head=0, metric="x")] == ["a"]
    assert len(table.select(metric="z")) == 0
    table.to_json(tmp_path / "t.json")
    assert "NaN" not in (tmp_path / "t.json").read_text()
    assert same(Table.from_json(tmp_path / "t.json"), table)
    table.to_csv(tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert read[0] == {"layer": "a", "head": "0", "metric": "x", "value": "0.1", "uniform": "inf"}
    assert read[1]["head"] == ""
    with pytest.raises(ValueError, match="records must all have the same null models"):
        Table([*records, Record("a", 0, "x", 0.1, {})])


def test_progress(capsys):
    analyze([call_of()], metrics=["entropies"], nulls=[])
    assert "analyze: 100%" in capsys.readouterr().err
    analyze([call_of()], metrics=["entropies"], nulls=[], progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"metrics": ["entropy"]}, ValueError, "metrics must be one of 'band_shares', .* got 'entropy'"),
        ({"metrics": "entropies"}, TypeError, r"metrics must be a sequence of names, .* pass \['entropies'\]"),
        ({"nulls": ["none"]}, ValueError, "nulls must be one of 'uniform', .* got 'none'"),
        ({"reduction": "first"}, ValueError, "reduction must be one of 'each', 'mean', 'last'; got 'first'"),
        ({"first_row": -1}, ValueError, "first_row must be an integer of at least 0 .* got -1"),
        ({"max_rows": 0}, ValueError, "max_rows must be an integer of at least 1 .* got 0"),
        ({"max_rows": 2.5}, TypeError, "max_rows must be an integer of at least 1, got 2.5"),
        ({"seed": -1}, ValueError, "seed must be an integer of at least 0"),
        ({"first_row": LENGTH}, ValueError, "layer 'one' has 2 heads here and rows of 0 heads in all"),
        ({"options": {"entropy": {}}}, ValueError, "options has 'entropy', which is none of power_spectral_density"),
        ({"options": {"wavelet_energy": {"wavelet": "haar"}}}, ValueError, "has 'wavelet', which is none of normalize"),
        ({"options": {"window_entropy": {"visible": None}}}, ValueError, "has 'visible', which is none of weighting"),
    ],
)
def test_refusals(given, error, message):
    with pytest.raises(error, match=message):
        analyze([call_of()], progress=False, **given)


def test_sources_that_are_refused():
    with pytest.raises(TypeError, match="got one AttentionCall; pass a list of it"):
        analyze(call_of(), progress=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sources must be AttentionCall or AttentionMap, got Tensor"):
        analyze([torch.ones(3)], progress=False)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="layer 'one' has 2 heads here and rows of 3 heads in all"):
        analyze([call_of(heads=3), call_of(heads=2)], progress=False)


def test_without_the_extra():
    """Only what needs an optional package asks for it, and says how to install it."""
    code = """
import sys
sys.modules.update(dict.fromkeys(("pywt", "tqdm", "matplotlib", "safetensors", "jinja2")))
from mra_attention import analysis
print(analysis.band_shares(analysis.power_spectral_density([1.0, 0.0])).sum())
for ask in (lambda: analysis.wavelet_coefficients([1.0]), lambda: analysis.analyze([])):
    try:
        ask()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1:] == [
        "a wavelet transform needs PyWavelets: pip install mra-attention[analysis]",
        "progress=True needs tqdm: pip install mra-attention[analysis]",
    ]
