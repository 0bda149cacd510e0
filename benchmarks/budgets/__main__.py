"""Choose budgets on one text and test them on another: `python -m benchmarks.budgets`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import sections
from ..models import packages
from ..models.__main__ import CACHE
from ..speed.report import folder
from . import compare, data, predictors, report


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.budgets",
        description="Budgets chosen on one text, tested on another, and what foretells the errors of heads.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    result.add_argument("--models", nargs="+", choices=("minilm", "gemma"), default=["minilm", "gemma"])
    result.add_argument("--rounds", type=int, default=7, help="timed calls of all layers, in turns")
    result.add_argument("--out", type=Path, help="folder of the record, in place of that of this CPU")
    result.add_argument("--cache", type=Path, default=CACHE, help="where Gemma's parts and its heads are kept")
    return result


def main() -> int:
    """Measure, print and record."""
    arguments = parser().parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # the packages have everything
    cases: dict[str, Callable[[], data.Case]] = {
        "minilm": data.encoder,
        "gemma": lambda: data.decoder(arguments.cache / "gemma-qkv-texts.npz", arguments.cache),
    }
    needed = {"minilm": packages.MINILM, "gemma": packages.GEMMA}
    parts: dict[str, str] = {}
    rows: dict[str, Sequence[Any]] = {}
    for name in tqdm(arguments.models, unit="model"):
        if install := packages.missing(needed[name]):
            print(f"{name}: skipped, packages are missing. Install them with: {install}")
            continue
        case = cases[name]()
        chosen_on, tested_on = (compare.curves_of(calls, case) for calls in (case.chosen_on, case.tested_on))
        found = compare.rows_of(case, chosen_on, tested_on, arguments.rounds)
        foretold = predictors.rows_of(case, chosen_on, tested_on)
        parts[f"Budgets from data: {case.name}"] = report.comparison(found, arguments.rounds)
        parts[f"What foretells errors: {case.name}"] = report.ranking(foretold, case.budget)
        rows |= {f"{name}: budgets": found, f"{name}: what foretells errors": foretold}
    torch.set_num_threads(1)  # as what is timed
    text = sections.document(parts)
    print(text)
    print(f"Recorded in {sections.write('budgets', text, rows, arguments.out or folder())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
