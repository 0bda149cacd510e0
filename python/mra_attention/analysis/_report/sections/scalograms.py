"""Scalograms of chosen heads."""

from __future__ import annotations

import numpy as np

from ..._arrays import Floats, steps
from ..chosen_heads import ChosenHead
from ..document import Figure, Picture, Section
from ..drawing import drawing
from ..findings import Findings
from ..head_grid import head_grid, scales
from ..palette import COLOR_MAP, NULLS, OBSERVED
from ..plots import decades, draw_nulls, legend_below, percent, write_ticks
from ..scalograms import Scalogram


def scalograms(found: Findings) -> Section:
    """Return the section."""
    names = scales(found.table)
    single = [_scalogram(found, head, some) for head, some in found.scalograms.items()]
    energies = [_energies(found, head, names) for head in found.chosen]
    return Section(
        "scalograms",
        "Scalograms",
        (
            "A wavelet transform says at which place and at which scale a row of attention changes: its finest "
            f"details, d1, compare neighbouring tokens, each next scale twice as many, and {names[0]} is what is "
            "left, the broad shape. A wavelet transform loses nothing and describes any signal, noise too, so a head "
            "is not “wavelet-like” because it has one; compare it with the null models.",
            "Shown are the heads at the ends of some metrics: " + _chosen(found) + ".",
        ),
        (
            Figure(
                "One row of attention, by place and scale",
                single,
                "Top: the weights of one query, in the middle of the text, on a logarithmic scale, and what distance "
                "alone would give. Middle: the energy of the row's wavelet transform by place (across) and scale "
                "(up); bright cells hold most of it. Bottom: the same for the row with its weights shuffled. Energy "
                "that gathers near the query at all scales is a peak there; what looks the same in the lower map is a "
                "matter of the sizes of the weights, not of their places. The transform joins the ends of a row, so "
                "what is at one end shows at the other, too.",
            ),
            Figure(
                "Energy by scale",
                energies,
                "Shares of the wavelet energy, mean over the rows that were looked at, from the broad shape on the "
                "left to single tokens on the right. Where the model follows a null model, that one explains the "
                "shares.",
            ),
        ),
    )


def _chosen(found: Findings) -> str:
    return "; ".join(f"{found.subject.name(head.layer, head.head)} ({head.roles})" for head in found.chosen)


def _title(found: Findings, head: ChosenHead) -> str:
    return f"{found.subject.name(head.layer, head.head)}: {head.roles}"


def _scalogram(found: Findings, head: ChosenHead, some: Scalogram) -> Picture:
    alt = f"Attention of query {some.query} of {_title(found, head)}, and its energy by place and scale"
    with drawing(f"scalogram-{head.key}", alt, (4.5, 4.3)) as drawn:
        row, observed, shuffled = drawn.figure.subplots(3, 1, sharex=True, height_ratios=(1.1, 1, 1))
        places = steps(some.row.size)
        null = NULLS["alibi"]
        row.plot(places, some.row, color=OBSERVED, linewidth=0.7, label="model")
        row.plot(places, some.distance_alone, color=null.color, linestyle=null.line, linewidth=1.1, label=null.label)
        row.axvline(some.query, color=NULLS["uniform"].color, linewidth=0.8, linestyle=":", label="the query")
        row.set(title=_title(found, head), ylabel="weight", yscale="log")
        row.set_ylim(max(float(some.row.max()) * 1e-6, 1e-12), float(some.row.max()) * 2.0)
        write_ticks(row.yaxis, lambda value: f"{value:g}")
        largest = max(float(some.energy.max()), float(some.shuffled.max()))
        for axes, energy, name in ((observed, some.energy, "model"), (shuffled, some.shuffled, "null: shuffled")):
            image = axes.imshow(
                np.log10(np.maximum(energy, largest * 1e-5)),
                cmap=COLOR_MAP,
                vmin=np.log10(largest) - 5.0,
                vmax=np.log10(largest),
                aspect="auto",
                origin="lower",
                extent=(-0.5, some.row.size - 0.5, -0.5, len(some.names) - 0.5),
            )
            axes.set_yticks(range(len(some.names)), some.names)
            axes.set_ylabel(name)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
        shuffled.set_xlabel("key position, from the first that the query sees")
        bar = drawn.figure.colorbar(image, ax=(observed, shuffled), label="share of energy")
        decades(bar)
        bar.outline.set_visible(False)
        legend_below(row, 3)
    return drawn.picture


def _energies(found: Findings, head: ChosenHead, names: list[str]) -> Picture:
    grids = {name: head_grid(found.table, f"wavelet_energy_{name}") for name in names}
    # A layer with fewer keys than others has fewer scales.
    names = [name for name, grid in grids.items() if not np.isnan(grid.values[head.layer, head.head])]
    of_scales = [grids[name] for name in names]
    observed = _shares([grid.values[head.layer, head.head] for grid in of_scales])
    nulls = {
        name: _shares([grid.nulls[name][head.layer, head.head] for grid in of_scales]) for name in found.table.nulls()
    }
    largest = names[int(np.argmax(observed))]
    alt = f"Energy by scale of {_title(found, head)}; {largest} has most"
    with drawing(f"energy-{head.key}", alt, (4.5, 2.9)) as drawn:
        axes = drawn.figure.subplots()
        places = steps(len(names))
        axes.plot(places, observed, color=OBSERVED, marker="o", label="model")
        draw_nulls(axes, places, nulls)
        axes.set_xticks(places, names)
        axes.set(
            title=_title(found, head), xlabel="scale, from the broad shape to single tokens", ylabel="share of energy"
        )
        axes.set_ylim(0.0, 1.04)
        percent(axes.yaxis)
        axes.grid(True)
        legend_below(axes, 3)
    return drawn.picture


def _shares(energies: list[float]) -> Floats:
    energy = np.array(energies)
    total = float(energy.sum())
    return energy / total if total > 0.0 else np.full(energy.shape, np.nan)
