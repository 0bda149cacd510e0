"""Time and error against the length and against the budget, as a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from matplotlib.axes import Axes
from mra_attention import scaled_dot_product_attention as mra
from tqdm import tqdm

from .accuracy import error_on_real_data
from .measure import inputs
from .report import machine
from .timing import interleaved

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
BUDGETS = (1, 2, 4, 8, 16, 32)
REAL_LENGTHS = (96, 128, 192, 256, 384, 512)
REAL_BUDGETS = (1, 2, 4, 8, 12, 15)


def draw(path: Path, seconds: float) -> None:
    """Measure and draw: SDPA and this package, forward, 4 heads of 64 channels, float32."""
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    _times(axes[0][0], axes[0][1], seconds)
    _errors(axes[1][0], axes[1][1])
    figure.suptitle(machine(), fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _times(by_length: Axes, by_budget: Axes, seconds: float) -> None:
    found = {length: _time(length, {}, seconds) for length in tqdm(LENGTHS, unit="length", leave=False)}
    _curves(by_length, LENGTHS, {"SDPA": [found[n][0] for n in LENGTHS], "MRA": [found[n][1] for n in LENGTHS]})
    by_length.set(xlabel="length", ylabel="forward, ms", title="time, 4 exact blocks per row, 4 heads of 64 channels")
    budgets = tqdm(BUDGETS, unit="budget", leave=False)
    found = {budget: _time(4096, {"blocks_per_row": budget}, seconds) for budget in budgets}
    _curves(by_budget, BUDGETS, {"SDPA": [found[n][0] for n in BUDGETS], "MRA": [found[n][1] for n in BUDGETS]})
    by_budget.set(xlabel="exact blocks per row, of 128", ylabel="forward, ms", title="time, length 4096")


def _time(length: int, keywords: dict[str, object], seconds: float) -> tuple[float, float]:
    tensors = inputs(4, length, 64)
    with torch.no_grad():
        times = interleaved(
            {"peer": lambda: F.scaled_dot_product_attention(*tensors), "ours": lambda: mra(*tensors, **keywords)},
            seconds=seconds,
            least=3,
        )
    return 1e3 * times["peer"], 1e3 * times["ours"]


def _errors(by_length: Axes, by_budget: Axes) -> None:
    modes = ("full", "sparse")
    curves = {mode: [error_on_real_data(length=n, blocks_per_row=2, mode=mode) for n in REAL_LENGTHS] for mode in modes}
    _curves(by_length, REAL_LENGTHS, curves)
    by_length.set_yscale("linear")
    by_length.set_ylim(bottom=0)
    by_length.set(xlabel="length", ylabel="relative error", title="error on a real encoder, 2 exact blocks per row")
    curves = {mode: [error_on_real_data(blocks_per_row=n, mode=mode) for n in REAL_BUDGETS] for mode in modes}
    _curves(by_budget, REAL_BUDGETS, curves)
    by_budget.set(
        xlabel="exact blocks per row, of 16", ylabel="relative error", title="error on a real encoder, length 512"
    )


def _curves(axes: Axes, x: tuple[int, ...], curves: dict[str, list[float]]) -> None:
    for label, values in curves.items():
        axes.plot(x, values, marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(x, [str(n) for n in x])
    axes.grid(alpha=0.3)
    axes.legend()
