"""Check, time, print, draw and record: `python -m benchmarks.speed`."""

from __future__ import annotations

import argparse
import sys

import torch
from tqdm import tqdm

from .accuracy import errors
from .measure import Row, measurements
from .plots import draw
from .report import folder, table, write_record


def main() -> int:
    """Run all measurements, or those whose name contains a word."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--only", default="", help="measure only what has this in its name, and keep no record")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each measurement (default: 10)")
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()), help="threads of both sides")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    wanted = [(name, run) for name, run in measurements(arguments.seconds) if arguments.only in name]
    rows: list[Row] = []
    progress = tqdm(wanted, unit="measurement")
    for name, run in progress:
        progress.set_postfix_str(name)
        rows += run()
    text = table(rows, errors())
    print(text)
    if not arguments.only:
        draw(folder() / "time-and-error.png", arguments.seconds / 10)
        print(f"\nRecorded in {write_record(rows, text)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
