"""The demo runs from the command line, compares like with like, and is repeatable."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

REPOSITORY = Path(__file__).parents[2]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
LENGTH = 200  # 7 blocks, the last one short


def run_demo(out: Path, *arguments: str) -> dict[str, list[str]]:
    """Run the demo for two steps; return the cells of its table by the label of their row."""
    command = [sys.executable, "-m", "benchmarks.demo", "--steps", "2", "--length", str(LENGTH), "--out", str(out)]
    finished = subprocess.run([*command, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    rows = (re.split(r"\s{2,}", line.strip()) for line in finished.stdout.splitlines())
    return {row[0]: row[1:] for row in rows}


def losses(table: dict[str, list[str]]) -> list[list[str]]:
    """Return the cells that do not depend on the machine's speed."""
    return [table[label] for label in ("training loss, first step", "training loss, last tenth", "validation loss")]


def test_full_budget(tmp_path: Path) -> None:
    """Both runs start from the same loss; the table has times and ratios; the picture is written."""
    out = tmp_path / "folder" / "demo.png"
    table = run_demo(out, "--blocks-per-row", "1000")
    assert out.read_bytes().startswith(PNG_SIGNATURE)
    exact, ours = map(float, table["training loss, first step"])
    # The same weights and the same batch: float32 rounding and the four printed decimals are all that may differ.
    assert ours == pytest.approx(exact, abs=2e-4)
    for label in ("seconds per step", "inside attention", "outside attention"):
        *seconds, ratio = table[label]
        assert all(float(cell) > 0 for cell in seconds)
        assert ratio.endswith("x")
    for run in (0, 1):
        parts = float(table["inside attention"][run]) + float(table["outside attention"][run])
        assert parts == pytest.approx(float(table["seconds per step"][run]), abs=2e-4)


def test_small_budget_is_not_exact_attention_and_repeats(tmp_path: Path) -> None:
    first = losses(run_demo(tmp_path / "demo.png", "--blocks-per-row", "1"))
    second = losses(run_demo(tmp_path / "demo.png", "--blocks-per-row", "1"))
    exact, ours = map(float, first[0])
    assert ours != exact, "the second run does not use MRA attention"
    assert first == second


def test_bad_argument_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["benchmarks.demo", "--steps", "0"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("benchmarks.demo.__main__").main()
    assert ended.value.code != 0
    assert "--steps is 0" in capsys.readouterr().err
