"""The examples of docs/analysis.md and of docstrings run, and the table of metrics names what there is."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import torch
from helpers import named
from mra_attention import analysis
from mra_attention.analysis import AttentionCall, analyze
from test_models_doc import run


def section(title: str) -> str:
    text = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text()
    (found,) = (some for some in text.split("\n## ") if some.startswith(title))
    return found


def test_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    run(section("Metrics"), names)
    run(section("Errors").split("\n### ")[0], names)
    assert (tmp_path / "metrics.csv").read_text().startswith("layer,head,metric,value,uniform,random,shuffled,alibi\n")


def test_docstrings():
    for name in analysis.__all__:
        described = getattr(analysis, name)
        if ">>>" in described.__doc__:
            (test,) = doctest.DocTestFinder(recurse=False).find(described, name, globs={})
            with named(name):
                assert doctest.DocTestRunner().run(test).failed == 0


def test_table_of_definitions_is_complete():
    definitions, nulls = (section("Metrics").split(title)[1] for title in ("### Definitions", "### Null models"))
    query, key, value = torch.randn(3, 1, 1, 200, 4).unbind()
    table = analyze([AttentionCall(query, key, value)], max_rows=4, progress=False)
    for record in table:
        stem = re.sub("_[ad][0-9]$|_[0-9.]+$", "", record.metric)
        assert f"`{stem}" in definitions or f"| {stem} |" in definitions, record.metric
    assert [name for name in table.nulls() if f"| `{name}` |" not in nulls] == []
