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
    """Return the results as text, beside the ratios of the last record of this CPU."""
    before = last_ratios()
    head = f"{'case':52} {'SDPA':>10} {'ours':>10} {'ratio':>8} {'before':>8} {'peak %':>7} {'error':>9}  aim"
    lines = [machine(), "", head]
    for row in rows:
        peer = "" if row.peer is None else f"{row.peer:.2f} {row.unit}"
        verdict = {True: "reached", False: "not reached", None: "for information"}[row.holds]
        error = "" if row.error is None else f"{row.error:.1e}"
        share = "" if row.share is None else f"{row.share:.0f}"
        last = f"{before[row.name]:.2f}" if row.name in before else ""
        numbers = f"{f'{row.ours:.2f} {row.unit}':>10} {row.ratio:8.2f} {last:>8} {share:>7} {error:>9}"
        lines.append(f"{row.name:52} {peer:>10} {numbers}  {row.wanted} {verdict}")
    lines += [
        "",
        "before: the ratio in the last record of this CPU. peak %: products of exact pairs, of the peak of all cores.",
        "error: relative error of the output against exact attention with the same arguments on real queries, keys and",
        "values, mean over 24 heads, tests/data/minilm_qkv.npz (512 tokens, 16 blocks in a row); by blocks_per_row:",
    ]
    budgets = list(errors["full"])
    lines.append(f"{'blocks_per_row':16}" + "".join(f"{budget:8}" for budget in budgets))
    lines += [f"{mode:16}" + "".join(f"{row[budget]:8.3f}" for budget in budgets) for mode, row in errors.items()]
    return "\n".join(lines)


def folder() -> Path:
    """Return the folder of this CPU, made if need be; its name may say little, so its best instruction set follows."""
    path = RECORD / re.sub(r"[^a-z0-9]+", "-", f"{cpu()} {_core.available_isas()[-1]}".lower()).strip("-")
    path.mkdir(parents=True, exist_ok=True)
    return path


def last_ratios() -> dict[str, float]:
    """Return the ratios in the last record of this CPU, by name; none if there is no record."""
    records = sorted(folder().glob("*.csv"))
    if not records:
        return {}
    with records[-1].open(newline="") as file:
        return {row["name"]: float(row["ratio"]) for row in csv.DictReader(file)}


def write_record(rows: Sequence[Row], text: str) -> Path:
    """Write `<cpu>/<date>.csv` and `.txt`, and return the folder."""
    path = folder()
    date = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    (path / f"{date}.txt").write_text(text + "\n")
    with (path / f"{date}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return path
