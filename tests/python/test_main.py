"""`python -m mra_attention`, in this process; test_isa.py runs it in new ones."""

from __future__ import annotations

import mra_attention
import pytest
import torch
from mra_attention import __main__ as report
from mra_attention import _core


def test_the_report(capsys):
    assert report.main() == 0
    printed = capsys.readouterr().out
    build = _core.build_info()
    for words in (build["profile"], build["rustc"], build["target"], _core.isa(), *_core.available_isas()):
        assert words in printed
    assert printed.count(": ok") == 4
    assert "FAILED" not in printed


@pytest.mark.parametrize("wrong", ["output", "gradient", "nan"])
def test_wrong_results_fail_the_self_check(capsys, monkeypatch, wrong):
    real = mra_attention.scaled_dot_product_attention

    def broken(query, key, value, **keywords):
        if wrong == "gradient":
            key = key + 0.01 * (key - key.detach())
        out = real(query, key, value, **keywords)
        if wrong == "output":
            return out + 1e-4
        return out.masked_fill(torch.arange(out.shape[2])[:, None] == 3, float("nan")) if wrong == "nan" else out

    monkeypatch.setattr(report, "scaled_dot_product_attention", broken)
    assert report.main() == 1
    assert "self-check FAILED" in capsys.readouterr().out
