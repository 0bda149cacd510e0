"""The table and the record of `make bench`."""

from __future__ import annotations

import csv
import datetime
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import mra_attention
import torch
from mra_attention import _core

from .measure import Row

RECORD = Path(__file__).parents[1] / "record"


def cpu() -> str:
    """Return the CPU's own name for itself."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def machine() -> str:
    """Return what the numbers depend on."""
    build = _core.build_info()
    return (
        f"{cpu()}, {torch.get_num_threads()} threads, {_core.isa()} of {', '.join(_core.available_isas())}\n"
        f"mra-attention {mra_attention.__version__} ({build['profile']}, {build['rustc']}), torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )


def table(rows: Sequence[Row], errors: dict[str, dict[int, float]]) -> str:
    """Return the results as text."""
    lines = [machine(), "", f"{'case':48} {'SDPA':>10} {'ours':>10} {'ratio':>8}  wanted"]
    for row in rows:
        peer = "" if row.peer is None else f"{row.peer:.2f} {row.unit}"
        verdict = {True: "holds", False: "DOES NOT HOLD", None: "for information"}[row.holds]
        lines.append(
            f"{row.name:48} {peer:>10} {f'{row.ours:.2f} {row.unit}':>10} {row.ratio:8.2f}  {row.wanted} {verdict}"
        )
    lines += [
        "",
        "Relative error of the output against exact attention, mean of the 24 heads of tests/data/minilm_qkv.npz:",
    ]
    budgets = list(errors["full"])
    lines.append(f"{'blocks_per_row':16}" + "".join(f"{budget:8}" for budget in budgets))
    lines += [f"{mode:16}" + "".join(f"{row[budget]:8.3f}" for budget in budgets) for mode, row in errors.items()]
    return "\n".join(lines)


def write_record(rows: Sequence[Row], text: str) -> Path:
    """Write `<cpu>/<date>.csv` and `.txt`, and return the folder."""
    folder = RECORD / re.sub(r"[^a-z0-9]+", "-", cpu().lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    (folder / f"{date}.txt").write_text(text + "\n")
    with (folder / f"{date}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return folder
