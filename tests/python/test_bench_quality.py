"""The benchmark of quality: baselines, errors at equal time, the sweep of entropies, and a small run of all of it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOAT64_TOLERANCE

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
np = pytest.importorskip("numpy")

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def module(benchmark: Callable[[str], ModuleType]) -> Callable[[str], ModuleType]:
    """Import a module of this benchmark by its name."""
    return lambda name: benchmark(f"quality.{name}")


def test_baselines_with_everything_are_softmax_attention(module):
    baselines = module("baselines")
    query, key, value = torch.randn(3, 1, 2, 20, 8, dtype=torch.float64).unbind()
    exact = F.scaled_dot_product_attention(query, key, value, scale=0.5)
    low_rank = baselines.nystrom(query, key, value, 0.5, 20, iterations=60)
    assert (low_rank - exact).abs().max() < 1e-6, "the middle is inverted"
    assert (baselines.window(query, key, value, 0.5, 39) - exact).abs().max() < FLOAT64_TOLERANCE
    alone = baselines.window(query, key, value, 0.5, 1)
    assert (alone - value).abs().max() < FLOAT64_TOLERANCE


def test_low_rank_is_right_where_queries_and_keys_are_few(module):
    query, key = (torch.randn(1, 1, 4, 8, dtype=torch.float64).repeat_interleave(16, dim=2) for _ in range(2))
    value = torch.randn(1, 1, 64, 8, dtype=torch.float64)
    exact = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    found = module("baselines").nystrom(query, key, value, 1.0, 4, iterations=60)
    assert (found - exact).abs().max() < 1e-6


def test_error_at_a_time(module):
    curves = module("curves")
    points = [curves.Point("", False, "a", keys, float(keys), 1 / keys) for keys in (4, 1, 2)]
    assert curves.at_time(points, 0.5) is None
    assert curves.at_time(points, 1.0) == pytest.approx(1.0)
    assert curves.at_time(points, 1.5) == pytest.approx(2**-0.5)
    assert curves.at_time(points, 9.0) == pytest.approx(0.25)


def test_tables(module):
    curves, entropy, report = module("curves"), module("entropy"), module("report")
    points = [curves.Point("x", False, "means", keys, keys / 1000, 1 / keys) for keys in (64, 128)]
    points += [curves.Point("x", False, "sparse", keys, keys / 500, 2 / keys) for keys in (64, 128)]
    table = report.equal_time_table(points).splitlines()
    assert table[2] == "| means | 0.0156 (1.00x) | 0.0078 (1.00x) |"
    assert table[3] == "| sparse |  | 0.0312 (4.00x) |"
    assert report.points_table(points).splitlines()[-1] == "| sparse | 128.00, 0.0312 | 256.00, 0.0156 |"
    heads = [entropy.Head(name, 1.0, h, h / 10) for name in entropy.METHODS[False] for h in (0.5, 2.25, 2.75)]
    lines = report.entropy_table(heads).splitlines()
    assert lines[0] == "| entropy of the rows, nats | 0 to 1 | 2 to 3 |"
    assert lines[2] == "| MRA, means | 0.050 | 0.250 |"


def test_entropy_and_error_of_heads(module):
    data, entropy = module("data"), module("entropy")
    query = torch.zeros(1, 2, 512, 8)
    layers = [(query, query, torch.randn(1, 2, 512, 8))]
    found = entropy.sweep(data.Heads("uniform", layers, 1.0, causal=False))
    assert len(found) == 2 * len(entropy.FACTORS) * len(entropy.METHODS[False])
    causal = entropy.sweep(data.Heads("uniform", layers, 1.0, causal=True))
    assert len(causal) == 2 * len(entropy.FACTORS) * len(entropy.METHODS[True])
    mean = sum(math.log(n) for n in range(1, 513)) / 512
    for head in causal:
        assert head.entropy == pytest.approx(mean)
        assert head.error < 1e-5, f"{head.method}: 512 keys are all"
    for head in found:
        assert head.entropy == pytest.approx(math.log(512))
        if head.method.startswith(("MRA", "low rank")):
            assert head.error < 1e-5, f"{head.method}: all tokens are alike"
        else:
            assert head.error > 0.3, head.method
    curve = entropy.curve([entropy.Head("", 1.0, h, h) for h in (1.0, 9.0)], np.array([1.0, 5.0, 9.0]))
    assert curve == pytest.approx([1.0, 5.0, 9.0])


def test_what_is_wrong_is_not_measured(module, monkeypatch):
    curves, data = module("curves"), module("data")
    heads = data.synthetic(1024)
    curves.check(heads)
    heads.scale *= 2  # what is exact at the old scale is wrong now
    heads.expected = lambda layer: data.synthetic(1024).expected(layer)
    with pytest.raises(AssertionError, match="every block exact: error"):
        curves.check(heads)


def test_a_small_run(module, monkeypatch, tmp_path, capsys):
    main, entropy = module("__main__"), module("entropy")
    for settings in (main.ENCODER, main.DECODER):
        assert set(settings) > {"means", "sparse"}
    monkeypatch.setattr(main, "ENCODER_KEYS", (64, 128))
    monkeypatch.setattr(main, "DECODER_KEYS", (256, 512))
    monkeypatch.setattr(entropy, "FACTORS", (0.25, 4.0))
    arguments = ["--length", "1024", "--real", "0", "--rounds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks.quality", *arguments])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # which the call sets, and the end of the test undoes
    assert main.main() == 0
    printed = capsys.readouterr().out
    assert "## Errors at equal time: MiniLM, 512 tokens, full" in printed
    assert "## Errors at equal time: synthetic decoder, 1024 tokens, causal" in printed
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[:2] == ["error-to-entropy.png", "error-to-time.png"]
    record = json.loads((tmp_path / names[2]).read_text())
    errors = {(p["data"], p["setting"], p["keys"]): p["error"] for p in record["settings"]}
    assert errors["MiniLM", "first order", 128] < errors["MiniLM", "means", 128] < errors["MiniLM", "sparse", 128]
    assert errors["MiniLM", "means", 128] == pytest.approx(0.26, abs=0.01), "as the README says"
