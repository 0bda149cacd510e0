"""The table and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import interpolate

from .heads import HeadView
from .train import Run


class Style(NamedTuple):
    """How a run is drawn."""

    color: str
    width: float
    marker: str


# The sky blue and the vermilion of Okabe and Ito, which the colour blind tell apart. The first line is wide: where the
# curves agree, both are seen.
STYLES = (Style("#56B4E9", 4.0, "o"), Style("#D55E00", 1.4, "x"))
MAP_PIXELS = 512
SMOOTHED_STEPS = 20


def format_table(baseline: Run, ours: Run, unigram_entropy: float) -> str:
    """Compare two runs; the ratio is the baseline's time over ours."""
    rows = [
        ("training loss, first step", "{:.4f}", baseline.losses[0], ours.losses[0], False),
        ("training loss, last tenth", "{:.4f}", baseline.last_loss, ours.last_loss, False),
        ("validation loss", "{:.4f}", baseline.validation_loss, ours.validation_loss, False),
        ("seconds per step", "{:.4f}", baseline.seconds_per_step, ours.seconds_per_step, True),
        ("  inside attention", "{:.4f}", baseline.attention_seconds_per_step, ours.attention_seconds_per_step, True),
        ("  outside attention", "{:.4f}", _outside(baseline), _outside(ours), True),
        ("  attention's share", "{:.0%}", 1 - _outside_share(baseline), 1 - _outside_share(ours), False),
        ("seconds of all steps", "{:.1f}", sum(baseline.step_seconds), sum(ours.step_seconds), True),
    ]
    header = f"{'':<27}{baseline.name:>12}{ours.name:>12}{'ratio':>8}"
    lines = [header, "-" * len(header)]
    for label, form, theirs, mine, is_time in rows:
        ratio = f"{theirs / mine:.2f}x" if is_time else ""
        lines.append(f"{label:<27}{form.format(theirs):>12}{form.format(mine):>12}{ratio:>8}")
    notes = (
        f"Losses are nats per masked byte. Byte frequencies alone give {unigram_entropy:.2f}, and a masked position",
        "shows nothing of its byte: whatever a model gains on that came through attention.",
        "Runs that differ in rounding alone (another number of threads, say) end about 0.02 apart.",
        "Seconds are medians over the steps (forward, backward, update) and ratios are of times, SDPA's over MRA's.",
        "Attention is timed inside the step, forward and backward, without its projections. It is only a part of",
        "the step; the rest is the same work in both runs, so the step gains less than attention does.",
    )
    return "\n".join([*lines, "", *notes])


def save_figure(path: Path, baseline: Run, ours: Run, unigram_entropy: float, view: HeadView) -> None:
    """Draw both loss curves, against steps and against time, and one head's attention beside its selected blocks."""
    figure = Figure(figsize=(12, 10.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.4), hspace=0.03, squeeze=False)[:, 0]
    steps, seconds = top.subplots(1, 2, sharey=True)
    for run, style in zip((baseline, ours), STYLES, strict=True):
        draw_losses(steps, list(range(1, len(run.losses) + 1)), run, style)
        draw_losses(seconds, list(accumulate(run.step_seconds)), run, style)
    for axis in (steps, seconds):
        axis.axhline(unigram_entropy, color="0.4", linestyle=":", label="byte frequencies alone")
        axis.grid(alpha=0.3)
    faint = {"color": STYLES[1].color, "alpha": 0.25, "linewidth": 0.8}
    steps.plot(range(1, len(ours.losses) + 1), ours.losses, label=f"{ours.name}, single steps", **faint)
    steps.legend(frameon=False, loc="upper right", handles=steps.lines[-1:])
    steps.set(
        xlabel="training step", ylabel="loss, nats per masked byte", title="Same seed, same batches: loss per step"
    )
    steps.xaxis.get_major_locator().set_params(integer=True)
    seconds.set(xlabel="seconds spent in training steps", title="The same curves against time", xlim=(0, None))
    seconds.legend(frameon=False, loc="upper right")
    exact, selection = bottom.subplots(1, 2, sharey=True)
    draw_head(exact, selection, view)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_losses(axis: Axes, positions: Sequence[float], run: Run, style: Style) -> None:
    """Draw the running mean of the training loss and, at its end, the validation loss."""
    label = f"{run.name}, training (mean of {SMOOTHED_STEPS} steps)"
    axis.plot(positions, running_mean(run.losses), color=style.color, linewidth=style.width, label=label)
    label = f"{run.name}, validation: {run.validation_loss:.3f}"
    axis.plot(
        positions[-1:],
        [run.validation_loss],
        color=style.color,
        linestyle="none",
        marker=style.marker,
        markersize=9,
        markerfacecolor="none",
        markeredgewidth=2,
        label=label,
    )


def draw_head(exact: Axes, selection: Axes, view: HeadView) -> None:
    """Draw the exact attention of a head, and the same where the plan computes it exactly."""
    length = len(view.attention)
    pixels = shrink(view.attention)
    covered = view.selected.repeat_interleave(view.block_size, 0).repeat_interleave(view.block_size, 1)
    covered = shrink(covered[:length, :length].float()) > 0.5
    colors = matplotlib.colormaps["viridis"].with_extremes(bad="0.88")
    peak = float(pixels.max())
    norm = LogNorm(vmin=peak * 1e-5, vmax=peak, clip=True)
    for axis, shown in ((exact, pixels), (selection, pixels.where(covered, torch.nan))):
        image = axis.imshow(shown.numpy(), norm=norm, cmap=colors, extent=(0, length, length, 0), interpolation="none")
        axis.set_xlabel("key position")
    exact.set_ylabel("query position")
    exact.set_title(f"Exact attention of head {view.head + 1} in layer {view.layer + 1}")
    num_selected, num_blocks = int(view.selected.sum()), view.selected.numel()
    share = view.captured[view.layer][view.head]
    everywhere = [captured for layer in view.captured for captured in layer]
    selection.set_title(
        f"Its {num_selected} selected blocks of {num_blocks} ({num_selected / num_blocks:.1%}) hold {share:.0%} of it\n"
        f"(all heads: {min(everywhere):.0%} to {max(everywhere):.0%}); grey enters through averages"
    )
    exact.figure.colorbar(image, ax=(exact, selection), label="attention weight", shrink=0.8)


def running_mean(values: list[float]) -> list[float]:
    """Mean of each value and those before it, at most `SMOOTHED_STEPS` of them."""
    return [
        sum(window) / len(window)
        for end in range(1, len(values) + 1)
        for window in [values[max(0, end - SMOOTHED_STEPS) : end]]
    ]


def shrink(image: Tensor) -> Tensor:
    """Average a square image down to at most `MAP_PIXELS` a side, so that thin lines do not vanish between pixels."""
    if len(image) <= MAP_PIXELS:
        return image
    return interpolate(image[None, None], size=(MAP_PIXELS, MAP_PIXELS), mode="area")[0, 0]


def _outside(run: Run) -> float:
    return run.seconds_per_step - run.attention_seconds_per_step


def _outside_share(run: Run) -> float:
    return _outside(run) / run.seconds_per_step
