"""``python -m benchmarks.demo``: train twice from one seed, with torch's attention and with MRA attention.

Prints a table and draws a picture. On two cores the defaults take about three minutes.
"""

from __future__ import annotations

import argparse
import platform
from functools import partial
from pathlib import Path
from time import perf_counter

import mra_attention
import torch
from torch.nn.functional import scaled_dot_product_attention

from .heads import view_head
from .model import HEAD_DIM, NUM_HEADS, NUM_LAYERS
from .report import format_table, save_figure
from .text import load_corpus
from .train import Settings, train, validation_batches

RESOLUTIONS = (32, 1)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description="Train a small byte-level encoder twice from one seed: torch's attention and MRA attention.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=250, help="training steps of each run")
    parser.add_argument("--length", type=int, default=2048, help="bytes in a window")
    parser.add_argument("--blocks-per-row", type=float, default=4.0, help="exact blocks for each block of queries")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights, the batches and the masks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of both runs")
    parser.add_argument("--out", type=Path, default=Path("build/demo.png"), help="where the picture goes")
    arguments = parser.parse_args()
    for name in ("steps", "length", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    return arguments


def main() -> None:
    """Run the demo."""
    start = perf_counter()
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    corpus = load_corpus()
    settings = Settings(arguments.steps, arguments.length, arguments.seed)
    budget = {"resolutions": RESOLUTIONS, "blocks_per_row": arguments.blocks_per_row}
    print(
        f"text: {corpus.num_files} files of Python {platform.python_version()}'s standard library, "
        f"{len(corpus.train) / 1e6:.1f} MB to train on, {len(corpus.validation) / 1e6:.1f} MB kept back\n"
        f"encoder: {NUM_LAYERS} layers, {NUM_HEADS} heads of {HEAD_DIM}, length {settings.length}, float32, "
        f"{arguments.threads} threads, torch {torch.__version__}\n"
        f"MRA: blocks of {RESOLUTIONS[0]}, {arguments.blocks_per_row:g} exact ones per row of blocks",
        flush=True,
    )
    baseline = train("torch SDPA", scaled_dot_product_attention, corpus, settings)
    ours = train("MRA", partial(mra_attention.scaled_dot_product_attention, **budget), corpus, settings)

    unigram_entropy = corpus.unigram_entropy()
    print(f"\n{format_table(baseline, ours, unigram_entropy)}")
    window = validation_batches(corpus, settings)[0]
    view = view_head(ours.model, window, partial(mra_attention.plan, **budget))
    save_figure(arguments.out, baseline, ours, unigram_entropy, view)
    print(f"\nThe loss curves, and an attention map beside the blocks selected for it: {arguments.out}")
    print(f"Everything took {perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
