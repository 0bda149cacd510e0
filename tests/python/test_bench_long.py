"""The benchmark of long sequences: its heads, what it compares with, its tables, and a small run of all of it."""

from __future__ import annotations

import json
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

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def module(benchmark: Callable[[str], ModuleType]) -> Callable[[str], ModuleType]:
    """Import a module of this benchmark by its name."""
    return benchmark


def test_heads_are_what_they_are_called(module):
    heads = module("long.heads")
    length = 4096
    query, key, value = heads.heads(length)
    assert query.shape == key.shape == value.shape == (1, 4, length, 64)
    assert all(torch.equal(a, b) for a, b in zip((query, key, value), heads.heads(length), strict=True))
    weights = (64**-0.5 * query @ key.mT).masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf).softmax(-1)
    late = weights[0, :, length // 2 :]
    sinks = late[..., 0].mean(-1)
    assert sinks[0] < 0.01
    assert ((sinks[1:] > 0.05) & (sinks[1:] < 0.9)).all()
    near = torch.ones(length, length).tril().triu(-63).bool()[length // 2 :]
    local = (late * near).sum(-1).mean(-1)
    assert (local[:2] > 2 * local[2:]).all()
    far = (late[..., 1 : length // 4] > 0.1).any(-1).float().mean(-1)
    assert far[2] > 5 * far[3], "some queries of the third head look for few keys"


def test_rope_turns_pairs_by_the_distance(module):
    rotate = module("long.heads").rotate
    x = torch.randn(8).expand(50, 8)
    turned = rotate(x, 1e4)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    logits = turned @ turned.T
    torch.testing.assert_close(logits[3, 7], logits[40, 44])


@pytest.mark.parametrize("causal", [False, True])
def test_exact_rows_are_those_of_softmax_attention(module, causal):
    exact = module("long.exact")
    query, key, value = (torch.randn(1, heads, 300, 8, dtype=torch.float64) for heads in (4, 2, 2))
    rows = exact.sample(300)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=0.7, enable_gqa=True)
    found = exact.exact_rows(query, key, value, rows, 0.7, causal=causal)
    assert (found - out[0, :, rows]).abs().max() < FLOAT64_TOLERANCE
    assert exact.error(1.25 * out, rows, found) == pytest.approx(0.25)
    out[0, 1, rows[5], 0] = torch.nan
    with pytest.raises(AssertionError, match="not finite"):
        exact.error(out, rows, found)


def test_a_wrong_ladder_is_not_timed(module, monkeypatch):
    checks = module("long.checks")
    checks.check_ladder(causal=True)
    attention = checks.mra
    monkeypatch.setattr(checks, "mra", lambda *args, **keywords: 1.001 * attention(*args, **keywords))
    with pytest.raises(AssertionError, match="out of a ladder that refines everything: error"):
        checks.check_ladder(causal=True)


def test_the_chosen_ladder_grows_with_the_length(module):
    settings = module("long.settings")
    assert settings.chosen_resolutions(4096) == (32, 1)
    assert settings.chosen_resolutions(65536) == (512, 32, 1)
    assert settings.chosen_resolutions(1048576) == (8192, 512, 32, 1)
    assert settings.chosen(4096, 4)["blocks_per_row"] == 4
    assert settings.chosen(65536, 4)["blocks_per_row"] == (settings.REFINED, 4)


def test_growth_and_what_sdpa_would_take(module):
    measure = module("long.measure")
    measured = {("auto", 1024): 0.1, ("auto", 16384): 1.7, ("auto", 65536): 7.0, ("SDPA", 16384): 2.0}
    rows = measure._time_rows(measured, [1024, 16384, 65536], causal=False)
    assert [(row.setting, row.length, row.measured) for row in rows[:3]] == [
        ("SDPA", 1024, False),
        ("SDPA", 16384, True),
        ("SDPA", 65536, False),
    ]
    assert rows[2].seconds == pytest.approx(32.0)
    assert rows[5].speedup == pytest.approx(32 / 7)
    assert [row.growth for row in rows[3:]] == [None, pytest.approx(17.0), None]
    assert measure.lengths(1048576) == [4096, 16384, 65536, 262144, 1048576]
    assert measure.lengths(1024) == [1024]


def test_extra_memory_is_that_of_a_process_of_its_own(module):
    assert 0 <= module("long.memory").extra_memory("auto", 4096, causal=False) < 2**28


def test_tables_aims_and_record(module, tmp_path):
    measure, report = module("long.measure"), module("long.report")
    longest = report.LONGEST
    times = [
        measure.Time("SDPA", False, 16384, 2.0),
        measure.Time("SDPA", False, longest, 8192.0, measured=False),
        measure.Time("auto", False, longest, 4.0, growth=21.0, speedup=2048.0, extra_bytes=2**30),
    ]
    table = report.times_table(times)
    assert f"| auto | {longest} | 4000.0 | 21.0x | 2048x | 1024 |" in table
    assert table.splitlines()[-4:] == [
        "- in parentheses: extrapolated from 16384 tokens, by the square of the length",
        "- auto, 1048576 tokens: at most 20x the time of 65536 tokens: not reached",
        "- auto, 1048576 tokens: at least 2000x as fast as SDPA would be: reached",
        "- auto, 1048576 tokens: within 3 GiB of extra memory: reached",
    ]
    steps = [measure.Step("auto", 65536, 1e-3), measure.Step("auto", longest, 2e-3, 2.0)]
    assert report.steps_table(steps).splitlines()[-1].endswith("a step at most 3x one at 65536: reached")
    points = [
        measure.Point("synthetic", True, 65536, "two levels, 8", 2.0, 6.0, 0.1),
        measure.Point("synthetic", True, 65536, "auto, 8", 0.5, 2.0, 0.11),
        measure.Point("synthetic", True, 65536, "(512, 32, 1), 8 and 16", 1.0, 3.0, 0.08),
    ]
    line = "- two levels, 8: (512, 32, 1), 8 and 16 takes 2.00x less time forward + backward, 2.00x less forward, with "
    assert report.comparison_table(points).splitlines()[-1] == line + "0.80 of the error, aim 1.3x: reached"
    assert report.comparison_table(points[:2]).endswith("- two levels, 8: no ladder here has as little error")
    text = report.document({"Times": table})
    assert report.write_record(text, {"times": times, "points": points}, tmp_path / "new") == tmp_path / "new"
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert [name.rsplit(".", 1)[1] for name in names] == ["json", "md"]
    record = json.loads((tmp_path / "new" / names[0]).read_text())
    assert record["times"][2]["extra_bytes"] == 2**30
    assert (tmp_path / "new" / names[1]).read_text() == text


def test_a_small_run(module, monkeypatch, tmp_path, capsys):
    measure = module("long.measure")
    monkeypatch.setattr(measure, "extra_memory", lambda *args, **keywords: 12 * 2**20)
    arguments = ["--longest", "1024", "--real", "0", "--seconds", "0", "--threads", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks.long", *arguments])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # which the call sets, and the end of the test undoes
    assert module("long.__main__").main() == 0
    printed = capsys.readouterr().out
    for heading in ("## times, full", "## times, causal", "## decoding", "full: synthetic", "causal: synthetic"):
        assert heading in printed
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[0] == "ladders.png"
    assert names[-1] == "time-to-length.png"
    record = json.loads((tmp_path / names[1]).read_text())
    tables = [rows for name, rows in record.items() if name != "machine"]
    assert [len(rows) > 0 for rows in tables] == [True] * 5
    assert all(row["seconds"] > 0 for row in tables[0])
    assert all(0 < row["error"] < 1 for row in [*tables[3], *tables[4]])


def test_bad_arguments_are_named(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.long", "--longest", "100"])
    with pytest.raises(SystemExit) as ended:
        module("long.__main__").main()
    assert ended.value.code != 0
    assert "--longest: 100 is less than 1024" in capsys.readouterr().err
