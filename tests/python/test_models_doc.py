"""The examples of docs/models.md about torch's modules, and those of the docstrings, run and print what they say."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import importlib.util
import io
import re
from pathlib import Path

import mra_attention
import pytest

SECTIONS = {
    "Without touching the model": None,
    "Modules": "['layers.0.self_attn']\n",
    "transformers": None,
    "Settings of single layers": None,
    "The MRA models of transformers": None,
    "Beside the softmax": None,
    "Images": None,
    "A bias that is learned": None,
}
"""What the last example of a section prints, where the text does not show it in a block of its own."""


def run(section: str, names: dict[str, object]) -> str:
    """Run the examples of a section; what a block of text shows must be what the one before it has printed."""
    printed = io.StringIO()
    for language, block in re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL):
        if language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(block, names)
        else:
            assert printed.getvalue() == block
    return printed.getvalue()


def test_document(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for title, output in SECTIONS.items():
        (section,) = (section for section in text.split("\n## ") if section.startswith(title))
        if "import register" in section or "patch_mra" in section:
            if importlib.util.find_spec("transformers") is None:
                continue
            names = {}
        printed = run(section, names)
        assert output is None or printed == output
    if importlib.util.find_spec("transformers"):
        importlib.import_module("mra_attention.integrations.transformers").unpatch_mra()


@pytest.mark.parametrize(
    "described",
    [
        mra_attention.LayerConfigs,
        mra_attention.replace_sdpa,
        mra_attention.nn.MultiheadAttention,
        mra_attention.nn.convert,
    ],
)
def test_docstrings(described):
    (test,) = doctest.DocTestFinder(recurse=False).find(described, described.__name__, globs={})
    result = doctest.DocTestRunner().run(test)
    assert result.attempted > 0
    assert result.failed == 0
