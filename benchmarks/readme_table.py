"""``python -m benchmarks.readme_table``: the numbers of the README.

Before anything is timed, results with every block exact are compared with torch's own. The timed inputs are standard
normal; the errors are those of real queries, keys and values (tests/data/minilm_qkv.npz), and of the timed inputs.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import mra_attention
import numpy as np
import torch
from mra_attention import _core
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

HEADS, HEAD_DIM = 8, 64
EVERY_BLOCK = 2**31
# At most this multiple of the error that torch's own float32 attention makes (docs/definitions.md, section 6).
OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
REAL_DATA = Path(__file__).parents[1] / "tests" / "data" / "minilm_qkv.npz"
REAL_LENGTH, REAL_LAYERS = 512, (1, 4)
BUDGETS = (1, 2, 4, 8, 16)
# With one thread, the processor time is the wall time of a machine that does nothing else.
CLOCKS: dict[str, Callable[[], float]] = {"wall": perf_counter, "cpu": process_time}

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme_table",
        description="Measure the tables of the README.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096, 16384], help="tokens")
    parser.add_argument("--blocks-per-row", type=float, default=4.0, help="exact blocks for each block of queries")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and of this package")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved runs, of which the median is taken")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall time, or processor time of all threads")
    return parser.parse_args()


def random_inputs(length: int) -> list[Tensor]:
    """Return query, key, value and grad_out, (1, H, L, D) each."""
    generator = torch.Generator().manual_seed(length)
    return list(torch.randn(4, 1, HEADS, length, HEAD_DIM, generator=generator).unbind())


def real_inputs(layer: int) -> list[Tensor]:
    """Return query, key and value of a layer, (1, 12, 512, 32) each."""
    with np.load(REAL_DATA) as stored:
        return [torch.from_numpy(stored[f"{name}{layer}"]).float()[None] for name in "qkv"]


def forward(attention: Attention, inputs: list[Tensor]) -> list[Tensor]:
    """Return the output."""
    with torch.no_grad():
        return [attention(*inputs[:3])]


def forward_backward(attention: Attention, inputs: list[Tensor]) -> list[Tensor]:
    """Return the output and the gradients of query, key and value."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]


def check_everything_selected(inputs: list[Tensor]) -> None:
    """Raise if results with every block exact are further from float64 than torch's own allow. One head is enough."""
    head = [tensor[:, :1] for tensor in inputs]
    everything = partial(mra_attention.scaled_dot_product_attention, num_blocks=EVERY_BLOCK)
    expected = forward_backward(scaled_dot_product_attention, [tensor.double() for tensor in head])
    theirs = forward_backward(scaled_dot_product_attention, head)
    ours = forward_backward(everything, head)
    for i, (name, want) in enumerate(zip(("out", "dq", "dk", "dv"), expected, strict=True)):
        allowed = (OUTPUT_FACTOR if i == 0 else GRADIENT_FACTOR) * float((theirs[i] - want).norm())
        error = float((ours[i] - want).norm())
        if not error <= allowed:
            raise RuntimeError(f"length {head[0].shape[2]}: error of {name} is {error:.2e}, allowed is {allowed:.2e}")


def interleaved_medians(calls: Sequence[Callable[[], object]], rounds: int, clock: Callable[[], float]) -> list[float]:
    """Return each call's median time in milliseconds; every round runs all of them, after one that does not count."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, seconds in zip(calls, times, strict=True):
            start = clock()
            call()
            seconds.append(clock() - start)
    return [1e3 * median(seconds[1:]) for seconds in times]


def head_errors(attention: Attention, inputs: list[Tensor]) -> Tensor:
    """Return for each head the Frobenius norm of the error over that of exact attention in float64."""
    exact = forward(scaled_dot_product_attention, [tensor.double() for tensor in inputs])[0]
    difference = forward(attention, inputs)[0] - exact
    return (difference.norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))).flatten()


def real_errors(attention: Attention) -> Tensor:
    """Return the errors of all heads of the real data."""
    return torch.cat([head_errors(attention, real_inputs(layer)) for layer in REAL_LAYERS])


def print_times(arguments: argparse.Namespace) -> None:
    """Print the table of times."""
    ours = partial(mra_attention.scaled_dot_product_attention, blocks_per_row=arguments.blocks_per_row)
    for length in arguments.lengths:
        check_everything_selected(random_inputs(length))
    print("Every block exact: equal to torch's attention at every length, output and gradients.\n")
    print("| length | SDPA, ms | MRA, ms | ratio | ratio with backward | error, real inputs | error, timed inputs |")
    print("|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    for length in arguments.lengths:
        inputs = random_inputs(length)
        calls = [
            partial(run, attention, inputs)
            for run in (forward, forward_backward)
            for attention in (scaled_dot_product_attention, ours)
        ]
        theirs, mine, theirs_both, mine_both = interleaved_medians(calls, arguments.rounds, CLOCKS[arguments.clock])
        real = f"{real_errors(ours).mean():.2f}" if length == REAL_LENGTH else "no data"
        timed = head_errors(ours, [tensor[:, :1] for tensor in inputs[:3]]).mean()
        print(
            f"| {length} | {theirs:.1f} | {mine:.1f} | {theirs / mine:.1f}x | {theirs_both / mine_both:.1f}x "
            f"| {real} | {timed:.2f} |",
            flush=True,
        )


def print_errors() -> None:
    """Print the table of errors against the budget."""
    print(f"\n| of {REAL_LENGTH // 32} blocks in a row, exact | " + " | ".join(map(str, BUDGETS)) + " |")
    print("|---|" + "---:|" * len(BUDGETS))
    for mode in ("full", "sparse"):
        cells: list[str] = []
        for budget in BUDGETS:
            ours = partial(mra_attention.scaled_dot_product_attention, mode=mode, blocks_per_row=budget)
            cells.append(f"{real_errors(ours).mean():.2g}")
        print(f'| `mode="{mode}"` | ' + " | ".join(cells) + " |")


def cpu_name() -> str:
    """Return the name of the CPU, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def main() -> None:
    """Check, measure and print."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    print(
        f"{cpu_name()}, {arguments.threads} threads, {_core.isa()}; mra-attention {mra_attention.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}; float32, B=1 H={HEADS} D={HEAD_DIM}, "
        f"blocks of 32, {arguments.blocks_per_row:g} per row; medians of {arguments.rounds}, {arguments.clock} time; "
        f"load average before: {os.getloadavg()[0]:.2f}",
        flush=True,
    )
    print_times(arguments)
    print_errors()


if __name__ == "__main__":
    main()
