"""Measure, print, draw and record what heads have of wavelets: `python -m benchmarks.wavelets`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from .. import sections
from ..models import packages
from ..models.__main__ import CACHE, positive
from . import page, report, sources
from .measure import measure
from .signals import signals
from .sources import Group

Load = Callable[[argparse.Namespace], list[Group]]

MODELS: dict[str, tuple[Mapping[str, str], Load]] = {
    "minilm": (packages.MINILM, lambda arguments: sources.minilm(arguments.documents)),
    "gemma": (packages.GEMMA, lambda arguments: sources.gemma(arguments.cache, arguments.sequences, arguments.length)),
}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.wavelets",
        description="Spectra and wavelets of the heads of two pretrained models, beside null models and errors.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    result.add_argument("--documents", type=positive, default=4, help="documents for MiniLM, of 512 tokens")
    result.add_argument("--sequences", type=positive, default=2, help="sequences for Gemma")
    result.add_argument("--length", type=positive, default=2048, help="tokens of each of Gemma's sequences")
    result.add_argument("--rows", type=positive, default=128, help="rows of each head and sequence that are looked at")
    result.add_argument("--threads", type=positive, default=1)
    result.add_argument("--cache", type=Path, default=CACHE, help="where Gemma's parts are joined, 253 MB")
    result.add_argument(
        "--out",
        type=Path,
        default=report.FOLDER,
        help="folder of the record; another one leaves docs/wavelets.md as it is",
    )
    return result


def main() -> int:
    """Measure both models, or the one whose packages are there."""
    arguments = parser().parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"  # the packages have everything
    found = []
    for model, (needed, load) in MODELS.items():
        install = packages.missing(needed)
        if install:
            print(f"{model}: skipped, packages are missing. Install them with: {install}")
            continue
        found += [measure(group, arguments.rows) for group in load(arguments)]
    if not found:
        return 0
    from . import plots

    of_definitions = signals()
    tables = report.all_tables(found, of_definitions)
    text = sections.document(tables)
    print(text)
    folder = report.write_record(text, found, of_definitions, arguments.out)
    plots.draw_bands(folder / "bands.png", found)
    plots.draw_bound(folder / "bound.png", found)
    plots.draw_predictions(folder / "predictions.png", found)
    print(f"Recorded in {folder}")
    if arguments.out == report.FOLDER:
        page.PAGE.write_text(page.with_tables(page.PAGE.read_text(), tables))
        print(f"Tables of {page.PAGE} replaced; compare its text with them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
