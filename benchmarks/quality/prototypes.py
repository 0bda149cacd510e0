"""Errors of coarse terms and choices on two layers of an encoder: `python -m benchmarks.quality.prototypes`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .methods import CHOICES, TERMS, choose, cut, error

DATA = Path(__file__).parents[2] / "tests" / "data" / "minilm_qkv.npz"
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)


def layers() -> list[list[Tensor]]:
    """Return query, key, value (12, 512, 32) of layers 1 and 4; what was tuned was tuned on layer 1."""
    data = np.load(DATA)
    return [[torch.from_numpy(data[f"{name}{layer}"]).double() for name in "qkv"] for layer in (1, 4)]


def print_methods(size: int) -> None:
    """Print the error of every term with every choice, for both layers at each share of exact blocks."""
    cuts = [cut(*layer, size) for layer in layers()]
    count = cuts[0].query.shape[1]
    shares = [share for share in SHARES if share * count >= 1]
    print(f"Blocks of {size}: error of layer 1 / 4 at each share of exact blocks, multiply-adds beside those of SDPA")
    for name, (term, products) in TERMS.items():
        cost = ", ".join(f"{share:g}: {share + products / 2 / size:.3f}" for share in shares)
        print(f"\n{name} ({cost})")
        for choice, scores in CHOICES.items():
            errors = [
                " / ".join(f"{error(x, term, choose(scores(x, term), share * count)):.3f}" for x in cuts)
                for share in shares
            ]
            print(f"  {choice:30s}" + "   ".join(errors))


def main() -> int:
    """Print errors of the prototypes; `python -m benchmarks.quality` has those of the package at equal time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.prototypes", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[32], help="block sizes of the prototypes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for size in arguments.sizes:
        print_methods(size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
