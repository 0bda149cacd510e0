"""The command line of the report: what it hands on, and what it says of mistakes."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mra_attention import MRAConfig
from mra_attention.analysis import AttentionCall, Capture
from mra_attention.analysis import __main__ as command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    calls = [AttentionCall(*torch.randn(3, 1, 2, 40, 8).unbind(), layer=f"layers.{i}") for i in range(2)]
    Capture(calls).save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what the command hands to `report`, which then writes nothing much."""
    found: dict[str, Any] = {}

    def report(calls: Any, path: Path, **more: Any) -> None:
        found.update(calls=calls, path=path, **more)
        path.write_text("page")

    monkeypatch.setattr(command, "report", report)
    return found


def test_a_saved_capture_has_a_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = folder.parent / "page.html"
    assert command.main(["report", str(folder), "-o", str(page), "--quiet"]) == 0
    assert "<h1>Attention of saved</h1>" in page.read_text(encoding="utf-8")
    said = capsys.readouterr()
    assert str(page) in said.out
    assert said.err == ""


def test_options_are_handed_on(folder: Path, handed: dict[str, Any]) -> None:
    (folder / "about.json").write_text(json.dumps({"Model": "a model", "Text": "a text"}))
    page = folder.parent / "page.html"
    options = "--layers *1 --heads 0-1,1 --rows 7 --target-error 0.1 --seed 5 --coarse mean first_order"
    arguments = ["report", str(folder), "-o", str(page), "--title", "A title", *options.split()]
    assert command.main(arguments) == 0
    assert [call.layer for call in handed.pop("calls")] == ["layers.1"]
    assert handed == {
        "path": page,
        "title": "A title",
        "about": {"Model": "a model", "Text": "a text"},
        "heads": [0, 1, 1],
        "max_rows": 7,
        "candidates": [MRAConfig(), MRAConfig(coarse="first_order")],
        "target_error": 0.1,
        "seed": 5,
        "progress": True,
    }


def test_the_defaults_are_those_of_the_function(folder: Path, handed: dict[str, Any]) -> None:
    assert command.main(["report", str(folder), "-o", str(folder.parent / "page.html")]) == 0
    assert len(handed.pop("calls")) == 2
    del handed["path"]
    assert handed == {
        "title": "Attention of saved",
        "about": {"Capture": str(folder)},
        "heads": None,
        "max_rows": None,
        "candidates": [MRAConfig()],
        "target_error": 0.05,
        "seed": 0,
        "progress": True,
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tokens", "5"], "--tokens=5 is for a model; "),
        (["--text", "novel.txt"], "--text=novel.txt is for a model; "),
        (["--layers", "encoder"], "layers has 'encoder', which matches none of 'layers.0', 'layers.1'"),
        (["--heads", "2"], "heads must be some of 0 .. 1"),
        (["--rows", "0"], "max_rows"),
    ],
)
def test_what_is_not_accepted_is_said_without_a_traceback(
    options: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = folder.parent / "page.html"
    assert command.main(["report", str(folder), "-o", str(page), *options]) == 1
    assert capsys.readouterr().err.startswith(f"error: {said}")
    assert not page.exists()


def test_a_folder_without_calls_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 1
    assert capsys.readouterr().err.startswith("error: path must be a folder of captured calls")


@pytest.mark.parametrize("name", ["report", "capture"])
def test_without_transformers_it_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert command.main([name, "no such model", "-o", "output"]) == 1
    assert "pip install transformers" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("heads", ["", "1-", "a", "-1", "3-1"])
def test_heads_are_numbers_and_ranges(heads: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["report", "saved", "-o", "page.html", f"--heads={heads}"])
    assert f"must be numbers and ranges as 0,3-5, got {heads!r}" in capsys.readouterr().err


def test_python_runs_it_by_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["analysis", "--help"])
    monkeypatch.delitem(sys.modules, "mra_attention.analysis.__main__")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("mra_attention.analysis", run_name="__main__")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "python -m mra_attention.analysis" in said
    assert "report" in said
    assert "capture" in said
