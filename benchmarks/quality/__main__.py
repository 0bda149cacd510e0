"""Check, measure, print, draw and record errors: `python -m benchmarks.quality`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ..models import packages
from ..models.__main__ import CACHE
from . import curves, data, entropy, plots, report
from .settings import DECODER, DECODER_KEYS, ENCODER, ENCODER_KEYS


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description="Errors at equal time of every setting, and errors against the entropy of the rows.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    result.add_argument("--length", type=int, default=8192, help="tokens of the decoders' heads")
    result.add_argument("--real", type=int, default=8192, help="tokens of Gemma's text; 0 leaves the model out")
    result.add_argument("--rounds", type=int, default=9, help="timed calls of each setting at each budget, in turns")
    result.add_argument("--out", type=Path, help="folder of the record, in place of that of this CPU")
    result.add_argument("--cache", type=Path, default=CACHE, help="where Gemma's parts and its heads are kept")
    return result


def sources(arguments: argparse.Namespace) -> list[Callable[[], data.Heads]]:
    """Return the functions that load heads."""
    found: list[Callable[[], data.Heads]] = [data.minilm, lambda: data.synthetic(arguments.length)]
    install = packages.missing(packages.GEMMA)
    if arguments.real and install:
        print(f"Gemma's heads: skipped, packages are missing. Install them with: {install}")
    elif arguments.real:
        found.append(lambda: data.gemma(arguments.cache, arguments.real))
    return found


def main() -> int:
    """Measure everything, with one thread."""
    arguments = parser().parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # the packages have everything
    sections: dict[str, str] = {}
    points: list[curves.Point] = []
    swept: dict[str, Sequence[entropy.Head]] = {}
    for load in tqdm(sources(arguments), unit="heads"):
        heads = load()
        torch.set_num_threads(1)  # the time of the thread that calls is all there is
        found = _points(heads, arguments.rounds)
        points += found
        where = f"{heads.name}, {heads.length} tokens, {'causal' if heads.causal else 'full'}"
        sections[f"Errors at equal time: {where}"] = report.equal_time_table(found)
        sections[f"Every budget: {where}"] = report.points_table(found)
        if heads.real:
            title = f"{where}, {entropy.CAUSAL_KEYS if heads.causal else entropy.KEYS} keys"
            swept[title] = entropy.sweep(heads)
            sections[f"Error by entropy, logits times 1/16 to 16: {title}"] = report.entropy_table(swept[title])
    text = report.document(sections)
    print(text)
    folder = report.write_record(text, {"settings": points, **swept}, arguments.out)
    plots.draw_settings(folder / "error-to-time.png", points)
    plots.draw_entropy(folder / "error-to-entropy.png", swept)
    print(f"Recorded in {folder}")
    return 0


def _points(heads: data.Heads, rounds: int) -> Sequence[curves.Point]:
    curves.check(heads)
    settings, keys = (DECODER, DECODER_KEYS) if heads.causal else (ENCODER, ENCODER_KEYS)
    return curves.measure(heads, settings, [n for n in keys if n <= heads.length // 2], rounds)


if __name__ == "__main__":
    sys.exit(main())
