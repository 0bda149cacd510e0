"""`python -m mra_attention.analysis`: a page about the heads of a model, and captures of what they are given."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config import MRAConfig
from ._report import report
from ._report.sources import TOKENS, Reading, calls_of, capture_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status."""
    given = _parser().parse_args(arguments)
    reading = Reading(given.text, given.tokens, given.gguf_file)
    try:
        if given.command == "capture":
            print(capture_model(given.model, given.layers, reading, given.output)[0], "in", given.output)
        else:
            _report(given, reading)
    except (ImportError, OSError, ValueError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _report(given: argparse.Namespace, reading: Reading) -> None:
    calls, about = calls_of(given.source, given.layers, reading)
    report(
        calls,
        given.output,
        title=given.title or f"Attention of {Path(given.source).name}",
        about=about,
        heads=given.heads,
        max_rows=given.rows,
        candidates=[MRAConfig(coarse=coarse) for coarse in given.coarse],
        target_error=given.target_error,
        seed=given.seed,
        progress=not given.quiet,
    )
    print(f"{given.output}: {given.output.stat().st_size / 1e6:.1f} MB")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mra_attention.analysis", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    page = commands.add_parser("report", help="write a page about the heads of a model")
    page.add_argument("source", help="the folder of a saved capture, or a folder or name of a model of transformers")
    page.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the page, a file of HTML")
    _add_reading(page)
    page.add_argument("--heads", type=_numbers, help="heads of every layer to look at, as 0,3-5; by default all")
    page.add_argument("--title", help="title of the page")
    page.add_argument("--rows", type=int, help="queries of a head that metrics look at; by default at most 128")
    page.add_argument(
        "--coarse",
        nargs="+",
        choices=("mean", "first_order"),
        default=["mean"],
        help="what a block that is not exact may be; with several, each layer is recommended the better one",
    )
    page.add_argument("--target-error", type=float, default=0.05, help="mean error of recommended budgets; %(default)s")
    page.add_argument("--seed", type=int, default=0, help="of null models and estimates; %(default)s")
    page.add_argument("--quiet", action="store_true", help="show no progress")
    folder = commands.add_parser("capture", help="save what the layers of a model hand to attention")
    folder.add_argument("model", help="a folder or name of a model of transformers")
    folder.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="a new folder")
    _add_reading(folder)
    return parser


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, metavar="FILE", help="what the model reads; by default Python's reference")
    parser.add_argument("--tokens", type=int, help=f"how much of it; by default {TOKENS}, or what the model takes")
    parser.add_argument("--layers", metavar="PATTERN", help="layers to look at, as in 'encoder.layers.1?.*'")
    parser.add_argument("--gguf-file", metavar="FILE", help="the file of the model in its folder, where that is GGUF")


def _numbers(text: str) -> list[int]:
    """Return the numbers of `0,3-5`."""
    numbers: list[int] = []
    for part in text.split(","):
        ends = part.split("-")
        if len(ends) > 2 or not all(map(str.isdecimal, ends)) or int(ends[0]) > int(ends[-1]):
            raise argparse.ArgumentTypeError(f"must be numbers and ranges as 0,3-5, got {text!r}")
        numbers.extend(range(int(ends[0]), int(ends[-1]) + 1))
    return numbers


if __name__ == "__main__":
    sys.exit(main())
