"""The page about the heads of a model: its parts, its numbers beside formulas written out, and what it refuses."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from mra_attention import MRAConfig, plan, scaled_dot_product_attention
from mra_attention.analysis import AttentionCall, calibrate, report
from mra_attention.analysis._report.budget_findings import measure_budgets
from mra_attention.analysis._report.drawing import drawing
from mra_attention.analysis._report.head_grid import HeadGrid
from mra_attention.analysis._report.head_maps import map_head
from mra_attention.analysis._report.scalograms import scalogram_of
from mra_attention.analysis._report.subject import heads_within, rows_within, with_heads
from report_pages import Element, parse
from torch import Tensor

HOSTILE = '<script>alert("1")</script> & $x_$'
LENGTH, HEADS = 170, 3
CANDIDATES = [MRAConfig(), MRAConfig(coarse="first_order")]


def call(layer: str = "layer", *, length: int = LENGTH, heads: int = HEADS, **more: Any) -> AttentionCall:
    return AttentionCall(*torch.randn(3, 1, heads, length, 8).mul(1.5).unbind(), layer=layer, **more)


@pytest.fixture(scope="module")
def calls() -> list[AttentionCall]:
    torch.manual_seed(0)
    return [call(HOSTILE), call(HOSTILE, length=100), call("second", is_causal=True), call("third", length=9, heads=2)]


@pytest.fixture(scope="module")
def page(calls: list[AttentionCall], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "page.html"
    report(calls, path, title=f"Of {HOSTILE}", about={"Model": HOSTILE}, candidates=CANDIDATES, progress=False)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tree(page: str) -> Element:
    return parse(page)


def sections(tree: Element) -> dict[str, Element]:
    return {section.attributes["id"]: section for section in tree.all("section")}


def grid(section: Element, title: str) -> list[dict[str, str]]:
    """Return the rows of the table with a title, by the heads of its columns."""
    (box,) = [each for each in section.all("div") if each.attributes.get("aria-label") == title]
    names = [cell.text() for cell in box.all("th")]
    return [dict(zip(names, (cell.text() for cell in row.all("td")), strict=True)) for row in box.all("tr")[1:]]


def test_it_has_every_section_and_a_table_of_contents(tree: Element) -> None:
    found = sections(tree)
    assert list(found) == [
        *("summary", "measured", "nulls", "locality", "bands", "scalograms"),
        *("entropies", "errors", "budgets", "blocks", "heads"),
    ]
    contents = {link.attributes["href"]: link.text() for link in tree.one("nav").all("a")}
    assert contents == {f"#{key}": section.all("h2")[0].text() for key, section in found.items()}


def test_figures_have_titles_captions_words_for_pictures_and_null_models(tree: Element) -> None:
    figures = tree.all("figure")
    assert len(figures) == 12
    for figure in figures:
        title = figure.one("h3").text()
        assert title
        assert len(figure.one("figcaption").text()) > 60, title
        pictures = figure.all("svg")
        assert pictures, title
        for picture in pictures:
            assert picture.attributes["role"] == "img", title
            assert len(picture.attributes["aria-label"]) > 20, title
            assert len([text for text in picture.all("text") if text.text()]) > 3, title
        # The maps of blocks and of budgets have theirs in the figures beside them.
        if not title.startswith(("Exact attention", "Budgets for")):
            assert "null: " in figure.text(), title


def test_it_needs_no_other_file(page: str, tree: Element) -> None:
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page
    names = {element.name for element in tree.all()}
    assert not names & {"script", "link", "iframe", "object", "embed", "base"}
    ids = [element.attributes["id"] for element in tree.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    for element in tree.all():
        assert "src" not in element.attributes
        assert not [name for name in element.attributes if name.startswith("on")]
        target = element.attributes.get("href", "#summary")
        assert target.startswith("data:image/png;base64,") or target.removeprefix("#") in ids, target
    for target in re.findall(r"url\(([^)]*)\)", page):
        assert target.removeprefix("#") in ids, target


def test_names_are_text(page: str, tree: Element) -> None:
    assert tree.one("title").text() == f"Of {HOSTILE}"
    assert tree.one("h1").text() == f"Of {HOSTILE}"
    assert {"What": "Model", "Value": HOSTILE} in grid(sections(tree)["measured"], "Model, text and options")
    assert [row["Name"] for row in grid(sections(tree)["measured"], "Layers")] == [HOSTILE, "second", "third"]
    assert "<script" not in page


def test_the_budgets_to_copy_are_those_of_calibrate(calls: list[AttentionCall], tree: Element) -> None:
    section = sections(tree)["budgets"]
    made: dict[str, Any] = {}
    exec(str(section.one("code").children[0]), made)
    expected = calibrate(calls, target_error=0.05, candidates=CANDIDATES)
    assert made["layers"] == expected.configs
    rows = grid(section, "Recommended budgets, layer by layer")
    assert [row["Key blocks"] for row in rows] == ["6", "6", "1"]
    for row, layer in zip(rows, expected.layers.values(), strict=True):
        budgets = layer.config.budgets()[0]
        of_heads = budgets * len(layer.errors) if len(budgets) == 1 else budgets
        assert [float(x) for x in row["Blocks per row, by head"].split()] == [
            min(budget, float(row["Key blocks"])) for budget in of_heads
        ]
    told = {row["What"]: row["Value"] for row in grid(sections(tree)["measured"], "Model, text and options")}
    assert told["Approximation"] == "blocks of 32 tokens, coarse=mean or coarse=first_order"


def test_settings_of_matplotlib_change_no_drawing() -> None:
    def draw() -> str:
        with drawing("key", "a title") as drawn:
            drawn.figure.subplots().set_title("a title")
        return drawn.picture.svg

    before = draw()
    with matplotlib.rc_context({"font.size": 30.0, "axes.grid": True}):
        assert draw() == before
        assert matplotlib.rcParams["font.size"] == 30.0


@pytest.mark.parametrize(
    ("heads", "nearest", "explains"),
    [
        ([0.1, 0.9], [0.15, 0.85], "most"),  # 0.05 away, 0.4 from the mean
        ([0.1, 0.9], [0.4, 0.6], "a part"),
        ([0.1, 0.9], [0.0, 0.1], "little"),
        ([0.501, 0.503], [0.5, 0.5], "most"),  # the other null model is 1.5 away from this one
        ([0.601, 0.603], [0.5, 0.5], "a part"),
        ([0.701, 0.703], [0.5, 0.5], "little"),
    ],
)
def test_a_null_model_explains_what_is_near_to_it(heads: list[float], nearest: list[float], explains: str) -> None:
    nulls = {"uniform": np.array([nearest]), "random": np.array([[2.0, 2.0]]), "shuffled": np.array([heads])}
    found = HeadGrid(np.array([heads]), nulls, kept=("shuffled",)).nearest_null()
    assert found is not None
    assert (found.name, found.explains) == ("uniform", explains)


def test_words_of_a_drawing_are_text() -> None:
    with drawing("key", f'"{HOSTILE}"') as drawn:
        drawn.figure.subplots().set_title(HOSTILE)
    picture = parse(drawn.picture.svg).one("svg")
    assert picture.attributes["aria-label"] == f'"{HOSTILE}"'
    assert HOSTILE in [text.text() for text in picture.all("text")]


def test_the_numbers_of_heads_are_those_of_formulas_in_float64(calls: list[AttentionCall], tree: Element) -> None:
    rows = grid(sections(tree)["heads"], "Numbers of all heads")
    assert [(row["Layer"], row["Head"]) for row in rows] == [*product("01", "012"), *product("2", "01")]
    for row in rows:
        layer, head = int(row["Layer"]), int(row["Head"])
        local, entropy = [], []
        for some in (calls[:2], calls[2:3], calls[3:])[layer]:
            weights = exact_weights(some, head)
            # 128 rows, evenly spaced.
            length = weights.shape[0]
            looked_at = torch.arange(length) if length <= 128 else torch.arange(128) * (length - 1) // 127
            distance = (torch.arange(length)[:, None] - torch.arange(length)).abs()
            local.append((weights * (distance < 32)).sum(-1)[looked_at])
            entropy.append(-torch.special.xlogy(weights, weights).sum(-1)[looked_at])
        # Written with two and three digits.
        assert float(row["Local share"].removesuffix(" %")) == pytest.approx(
            100 * float(torch.cat(local).mean()), abs=0.5
        )
        assert float(row["Positional entropy"]) == pytest.approx(float(torch.cat(entropy).mean()), abs=0.005)


def exact_weights(some: AttentionCall, head: int) -> Tensor:
    """Return the weights of a head of the first sequence, in float64."""
    query, key = some.query[0, head].double(), some.key[0, head].double()
    logits = query @ key.T / math.sqrt(query.shape[1])
    if some.is_causal:
        logits = logits.masked_fill(torch.ones(logits.shape, dtype=torch.bool).triu(1), -math.inf)
    if some.attn_mask is not None:
        logits = logits.masked_fill(~some.attn_mask[0, 0, 0], -math.inf)
    return logits.softmax(-1)


PADDING = torch.arange(LENGTH)[None, None, None] >= 21


@pytest.mark.parametrize(
    "given",
    [call(), call(is_causal=True), call(attn_mask=PADDING)],
    ids=["block form", "token form", "padding in front"],
)
def test_the_attention_in_chosen_blocks_is_summed_by_hand(given: AttentionCall) -> None:
    config, head = MRAConfig(resolutions=(16, 1), blocks_per_row=2.0), 1
    found = map_head(given, head, config)
    arguments = {"is_causal": given.is_causal, "attn_mask": given.attn_mask}
    mask = plan(given.query, given.key, config=config, **arguments).block_masks()[0][head]
    weights = exact_weights(given, head)
    # Padded queries in front are two blocks by themselves.
    first, front = (0, 0) if given.attn_mask is None else (21, 2)
    held = best = chance = total = 0.0
    exact = seen = 0
    for row, of_plan in enumerate(mask[front:]):
        begin, end = (row, row + 1) if given.is_causal else (first + 16 * row, first + 16 * (row + 1))
        of_row = weights[begin:end]
        masses = [float(of_row[:, first + 16 * i : first + 16 * (i + 1)].sum()) for i in range(mask.shape[1])]
        live = [i for i in range(mask.shape[1]) if not given.is_causal or 16 * i <= row]
        chosen = [i for i in live if of_plan[i]]
        held += sum(masses[i] for i in chosen)
        best += sum(sorted(masses)[-len(chosen) :])
        chance += sum(masses) * len(chosen) / len(live)
        total += sum(masses)
        exact, seen = exact + len(chosen), seen + len(live)
    # Sums of at most 170 * 170 products in float64.
    expected = (exact / seen, held / total, best / total, chance / total)
    assert (found.density, found.held, found.best, found.chance) == pytest.approx(expected, rel=1e-9)
    assert found.shape == (LENGTH, LENGTH)
    pixel = (100, 57)
    row, column = (100 if given.is_causal else front + (100 - first) // 16), (57 - first) // 16
    assert found.chosen[pixel] == bool(mask[row, column])
    assert found.weights[pixel] == pytest.approx(float(weights[pixel]), rel=1e-9)


def test_the_pixels_of_a_long_map_are_means() -> None:
    given = call(length=600, heads=1)
    found = map_head(given, 0, MRAConfig())
    assert found.weights.shape == found.chosen.shape == (200, 200)
    expected = exact_weights(given, 0).reshape(200, 3, 200, 3).mean((1, 3))
    np.testing.assert_allclose(found.weights, expected.numpy(), rtol=1e-9)


def test_a_scalogram_has_the_energy_of_a_row_at_its_place() -> None:
    length = 128
    key = torch.eye(length)[None, None] * 1000.0
    found = scalogram_of(AttentionCall(key.roll(40, 2), key, key, scale=1.0), 0, seed=0)
    assert found is not None
    # Of rows 0, 63 and 127 the second; it looks at key 23 alone.
    assert found.query == 63
    assert int(found.row.argmax()) == 23
    assert found.energy.sum() == pytest.approx(1.0, rel=1e-12)
    assert found.names == ["d1", "d2", "d3", "d4", "d5", "a5"]
    assert abs(int(found.energy[0].argmax()) - 23) <= 2
    seen = scalogram_of(call(length=length, is_causal=True), 0, seed=0)
    assert seen is not None
    assert seen.row.shape == (64,)


def test_the_cheapest_ways_are_those_of_calibrate_and_of_attention_itself() -> None:
    given = [call("first"), call("second", is_causal=True)]
    config = MRAConfig(resolutions=(16, 1))
    found = measure_budgets(given, [0, 2], [config], 0.2, 0)
    part = [replace(x, query=x.query[:, ::2], key=x.key[:, ::2], value=x.value[:, ::2]) for x in given]
    for target in (0.3, 0.1):
        expected = calibrate(part, target_error=target, candidates=[config])
        assert found.cheapest(target).cost == pytest.approx(expected.cost / expected.exact_cost, rel=1e-12)
        assert found.cheapest(target).error == pytest.approx(expected.error, rel=1e-12)
    errors = []
    for some in part:
        tensors, masked = (some.query, some.key, some.value), {"is_causal": some.is_causal}
        out = scaled_dot_product_attention(*tensors, config=replace(config, blocks_per_row=3.0), **masked).double()
        exact = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in tensors), **masked)
        errors += [float((out - exact)[0, i].norm() / exact[0, i].norm()) for i in range(2)]
    of_three = next(trade for budget, trade in found.alike[config] if budget == 3.0)
    # The float32 rounding of exact attention, beside errors of tenths.
    assert of_three.error == pytest.approx(sum(errors) / 4, rel=1e-5)
    budget, trade = found.cheapest_alike(of_three.error)
    assert (budget, trade) == (3.0, of_three)


def test_some_heads_of_a_call_are_those_heads() -> None:
    query, (key, value) = torch.randn(2, 6, 40, 8), torch.randn(2, 2, 2, 40, 8)
    bias, slopes, sinks = torch.randn(1, 6, 40, 40), torch.rand(6), torch.randn(6)
    given = AttentionCall(query, key, value, attn_mask=bias, alibi_slopes=slopes, sinks=sinks)
    for some in (given, replace(given, attn_mask=bias[0]), replace(given, attn_mask=bias[:, :1])):
        part = with_heads(some, [4, 1])
        everything = {"blocks_per_row": math.inf}
        out = scaled_dot_product_attention(some.query, some.key, some.value, **some.arguments(), **everything)
        of_part = scaled_dot_product_attention(part.query, part.key, part.value, **part.arguments(), **everything)
        torch.testing.assert_close(of_part, out[:, [4, 1]], rtol=0, atol=0)


def test_what_takes_long_is_of_some_rows_and_heads() -> None:
    # Nothing of this size is stored.
    query = torch.zeros(()).expand(1, 32, 16384, 64)
    long = [AttentionCall(query, query, query, layer=str(i)) for i in range(16)]
    rows, heads = rows_within(long), heads_within(long)
    assert 8 <= rows < 128
    assert 5 * 16 * 32 * 16384 * rows <= 200_000_000 or rows == 8
    assert 1 <= len(heads) < 32
    assert heads == sorted(set(heads))
    assert heads[0] == 0
    assert max(heads) >= 32 - 2 * 32 // len(heads)
    short = [call()]
    assert rows_within(short) == 128
    assert heads_within(short) == [0, 1, 2]


def test_of_calls_with_some_of_their_queries_there_are_no_errors(tmp_path: Path) -> None:
    whole = call(length=90)
    kept = torch.arange(5, 90, 10)
    given = [replace(whole, query=whole.query[:, :, kept], query_rows=kept, query_length=90)]
    report(given, tmp_path / "page.html", heads=[2, 0], max_rows=4, progress=False)
    found = sections(parse((tmp_path / "page.html").read_text(encoding="utf-8")))
    assert "only some of the queries" in found["errors"].text()
    assert {"budgets", "blocks"} & found.keys() == set()
    assert [row["Head"] for row in grid(found["heads"], "Numbers of all heads")] == ["2", "0"]
    assert "4 of each head" in found["measured"].text()


def test_of_sequences_of_one_block_there_are_no_errors_and_the_bytes_are_the_same_again(tmp_path: Path) -> None:
    given = [call(length=9, heads=1), call(length=1, heads=1)]
    texts = []
    for name in ("first.html", "second.html"):
        report(given, tmp_path / name, progress=False)
        texts.append((tmp_path / name).read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    found = sections(parse(texts[0]))
    assert "shorter than a block" in found["errors"].text()
    assert {"budgets", "blocks"} & found.keys() == set()


REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"calls": []}, ValueError, "calls is empty"),
    ({"calls": [1]}, TypeError, "calls must be of mra_attention.analysis.AttentionCall, got int at 0"),
    ({"heads": [3]}, ValueError, r"heads must be some of 0 .. 2, .* got \[3\]"),
    ({"heads": []}, ValueError, r"heads must be some of 0 .. 2, .* got \[\]"),
    ({"title": 5}, TypeError, "title must be text, got 5"),
    ({"about": {"Model": 5}}, TypeError, "about must be text, got 5"),
    ({"max_rows": 0}, ValueError, "max_rows"),
    ({"target_error": -1.0}, ValueError, "target_error"),
    ({"seed": -1}, ValueError, "seed"),
    ({"candidates": []}, TypeError, "candidates"),
    ({"progress": "no"}, TypeError, "progress"),
    ({"path": "missing/page.html"}, FileNotFoundError, "path must be a file in a folder that is there"),
    ({"path": "."}, IsADirectoryError, "path must be a file"),
]


@pytest.mark.parametrize(("given", "error", "match"), REFUSALS)
def test_what_is_not_accepted_is_named(
    given: dict[str, Any], error: type[Exception], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=match):
        report(**{"calls": [call(length=8)], "path": "page.html", "progress": False} | given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["jinja2", "matplotlib"])
def test_without_what_it_needs_it_says_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"needs {name}: pip install mra-attention\[analysis\]"):
        report([call(length=8)], tmp_path / "page.html", progress=False)
