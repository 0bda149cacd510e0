"""Check, time, print and record: `python -m benchmarks.models`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import packages

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mra-attention"


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.models",
        description="What a budget costs in accuracy and saves in time, in two pretrained models.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    result.add_argument("--only", choices=tuple(MODELS), help="measure one of the models, and keep no record")
    result.add_argument("--lengths", type=positive, nargs="+", default=[8192, 16384], help="tokens of Gemma's text")
    result.add_argument("--blocks", type=positive, nargs="+", default=[4, 8, 16, 32], help="Gemma's budgets")
    result.add_argument("--rounds", type=positive, default=1, help="how often each length is timed, in turns")
    result.add_argument("--documents", type=positive, default=64, help="documents for MiniLM, of 512 tokens")
    result.add_argument("--threads", type=positive, default=min(2, torch.get_num_threads()), help="of both sides")
    result.add_argument("--cache", type=Path, default=CACHE, help="where Gemma's parts are joined, 253 MB")
    result.add_argument("--no-record", action="store_true", help="print only")
    return result


def main() -> int:
    """Measure both models, or one of them."""
    arguments = parser().parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"  # the packages have everything
    rows: dict[str, Sequence[Any]] = {}
    sections: dict[str, str] = {}
    for model in [arguments.only] if arguments.only else MODELS:
        needed, measure = MODELS[model]
        install = packages.missing(needed)
        if install:
            print(f"{model}: skipped, packages are missing. Install them with: {install}")
            continue
        rows[model], heading, table = measure(arguments)
        sections[heading] = table
    if not sections:
        return 0
    from . import report

    text = report.document(sections)
    print(text)
    if not arguments.no_record and len(sections) == len(MODELS):
        print(f"Recorded in {report.write_record(text, rows)}")
    return 0


def _gemma(arguments: argparse.Namespace) -> tuple[Sequence[Any], str, str]:
    from . import gemma, report

    model, tokenizer = gemma.load(arguments.cache)
    error = gemma.check(model, tokenizer)
    rows = gemma.measure(model, tokenizer, arguments.lengths, arguments.blocks, arguments.rounds)
    heading = (
        f"Gemma 3 270M, float32, {arguments.rounds} round{'s' * (arguments.rounds > 1)}; with every block exact, "
        f"{gemma.CHECKED_LENGTH} tokens differ by {error:.1e}"
    )
    return rows, heading, report.gemma_table(rows)


def _minilm(arguments: argparse.Namespace) -> tuple[Sequence[Any], str, str]:
    from . import minilm, report

    rows = minilm.measure(*minilm.load(), (1, 2, 4, 8, 16), arguments.documents)
    heading = (
        f"all-MiniLM-L6-v2, {arguments.documents} documents of {minilm.LENGTH} tokens, embeddings against exact ones"
    )
    return rows, heading, report.minilm_table(rows)


MODELS = {"gemma": (packages.GEMMA, _gemma), "minilm": (packages.MINILM, _minilm)}


def positive(text: str) -> int:
    """Return an argument of a command line that is 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
