"""Check, time, print, draw and record long sequences: `python -m benchmarks.long`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..models import packages
from ..models.__main__ import CACHE
from . import checks, measure, plots, report
from .settings import BUDGET, SETTINGS, Setting

Measurement = tuple[str, Callable[[], tuple[str, Sequence[Any]]]]
FORMS = {False: "full", True: "causal"}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.long",
        description="Time and memory up to a million tokens, and ladders beside two levels.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    result.add_argument("--longest", type=_length, default=report.LONGEST, help="tokens of the longest sequence")
    result.add_argument("--compare", type=_length, default=65536, help="tokens at which ladders meet two levels")
    result.add_argument("--real", type=int, default=32768, help="tokens of Gemma's text; 0 leaves the model out")
    result.add_argument("--seconds", type=float, default=10.0, help="least time for each group of measurements")
    result.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()), help="threads of both sides")
    result.add_argument("--out", type=Path, help="folder of the record, in place of that of this CPU")
    result.add_argument("--cache", type=Path, default=CACHE, help="where Gemma's parts and its heads are kept")
    result.add_argument("--only", default="", help="measure only what has this in its name, and keep no record")
    return result


def measurements(arguments: argparse.Namespace) -> list[Measurement]:
    """Return the heading of each table and the function that makes the table and its rows."""
    longest, seconds = arguments.longest, arguments.seconds
    compare = min(arguments.compare, longest)
    found: list[Measurement] = []
    for causal, form in FORMS.items():
        name = f"times, {form}: one head of 64 channels, {report.budgets()}"
        found.append((name, lambda causal=causal: _times(longest, seconds, causal=causal)))
    found.append(("decoding: 4 heads of 64 channels", lambda: _steps(longest, seconds)))
    for causal, form in FORMS.items():
        name = f"ladders beside two levels, {form}: synthetic heads, {compare} tokens"
        found.append((name, lambda causal=causal: _synthetic(compare, seconds, causal=causal)))
    install = packages.missing(packages.GEMMA)
    if arguments.real and install:
        print(f"Gemma's heads: skipped, packages are missing. Install them with: {install}")
    elif arguments.real:
        name = f"ladders beside two levels, causal: Gemma 3 270M, {arguments.real} tokens, 3 layers of 4 heads"
        found.append((name, lambda: _real(arguments.cache, arguments.real, seconds)))
    return found


def _times(longest: int, seconds: float, *, causal: bool) -> tuple[str, Sequence[measure.Time]]:
    checks.check_ladder(causal=causal)
    rows = measure.times(longest, seconds, causal=causal)
    measure.add_memory(rows)
    return report.times_table(rows), rows


def _steps(longest: int, seconds: float) -> tuple[str, Sequence[measure.Step]]:
    rows: list[measure.Step] = []
    refused: list[str] = []
    for setting in SETTINGS:
        found = _steps_of(setting, longest, seconds)
        if isinstance(found, str):
            refused.append(f"- {setting.name}: {found}")
        else:
            rows += found
    return "\n".join([report.steps_table(rows), *refused]), rows


def _steps_of(setting: Setting, longest: int, seconds: float) -> list[measure.Step] | str:
    """Return the steps of a setting, or why a cache refuses it."""
    try:
        checks.check_decoding(setting.keywords(longest, BUDGET[True]))
        return measure.decoding(setting, longest, seconds)
    except (NotImplementedError, ValueError) as reason:
        return f"refused: {reason}"


def _synthetic(length: int, seconds: float, *, causal: bool) -> tuple[str, Sequence[measure.Point]]:
    points = measure.synthetic(length, seconds, causal=causal)
    return report.comparison_table(points), points


def _real(cache: Path, length: int, seconds: float) -> tuple[str, Sequence[measure.Point]]:
    from . import real

    points = measure.comparison("Gemma 3 270M", real.layers(cache, length), real.SCALE, seconds, causal=True)
    return report.comparison_table(points), points


def main() -> int:
    """Run all measurements, or those whose name contains a word."""
    arguments = parser().parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"  # the packages have everything
    sections: dict[str, str] = {}
    rows: dict[str, Sequence[Any]] = {}
    progress = tqdm([(name, run) for name, run in measurements(arguments) if arguments.only in name], unit="table")
    for name, run in progress:
        progress.set_postfix_str(name.split(":")[0])
        sections[name], rows[name] = run()
    text = report.document(sections)
    print(text)
    if not arguments.only:
        folder = report.write_record(text, rows, arguments.out)
        every = [row for table in rows.values() for row in table]
        plots.draw_times(folder / "time-to-length.png", [row for row in every if isinstance(row, measure.Time)])
        plots.draw_comparisons(folder / "ladders.png", [row for row in every if isinstance(row, measure.Point)])
        print(f"Recorded in {folder}")
    return 0


def _length(text: str) -> int:
    value = int(text)
    if value < 1024:
        raise argparse.ArgumentTypeError(f"{value} is less than 1024")
    return value


if __name__ == "__main__":
    sys.exit(main())
