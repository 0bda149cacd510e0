"""The examples of docs/models.md about torch's modules, and those of the docstrings, run and print what they say."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from pathlib import Path

import mra_attention
import pytest

SECTIONS = ("Without touching the model", "Modules")


def test_document():
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    sections = [section for section in text.split("\n## ") if section.startswith(SECTIONS)]
    assert len(sections) == len(SECTIONS)
    names: dict[str, object] = {}
    printed = io.StringIO()
    for language, block in re.findall(r"```(\w+)\n(.*?)```", "".join(sections), re.DOTALL):
        if language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(block, names)
        else:
            assert printed.getvalue() == block
    assert printed.getvalue() == "['layers.0.self_attn']\n"


@pytest.mark.parametrize(
    "described", [mra_attention.replace_sdpa, mra_attention.nn.MultiheadAttention, mra_attention.nn.convert]
)
def test_docstrings(described):
    (test,) = doctest.DocTestFinder(recurse=False).find(described, described.__name__, globs={})
    result = doctest.DocTestRunner().run(test)
    assert result.attempted > 0
    assert result.failed == 0
