"""The example of docs/analysis.md about metrics runs and prints what it says, and the table names what there is."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from mra_attention.analysis import AttentionCall, analyze
from test_models_doc import run


def metrics_section() -> str:
    text = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text()
    (section,) = (section for section in text.split("\n## ") if section.startswith("Metrics"))
    return section


def test_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(metrics_section(), {})
    assert (tmp_path / "metrics.csv").read_text().startswith("layer,head,metric,value,uniform,random,shuffled,alibi\n")


def test_table_of_definitions_is_complete():
    definitions, nulls = (metrics_section().split(title)[1] for title in ("### Definitions", "### Null models"))
    query, key, value = torch.randn(3, 1, 1, 200, 4).unbind()
    table = analyze([AttentionCall(query, key, value)], max_rows=4, progress=False)
    for record in table:
        stem = re.sub("_[ad][0-9]$|_[0-9.]+$", "", record.metric)
        assert f"`{stem}" in definitions or f"| {stem} |" in definitions, record.metric
    assert [name for name in table.nulls() if f"| `{name}` |" not in nulls] == []
