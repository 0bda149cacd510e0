"""Entropies of attention over positions and over frequencies, and how they go together."""

from __future__ import annotations

import numpy as np

from ..._arrays import steps
from ..document import Figure, Picture, Section
from ..drawing import drawing
from ..findings import Findings
from ..head_grid import HeadGrid, head_grid, mean
from ..palette import NULLS
from ..plots import MOST_DOTS, by_layer, head_map, layer_colors, legend_below, number
from .words import explained


def entropies(found: Findings) -> Section:
    """Return the section."""
    positional = head_grid(found.table, "positional_entropy")
    spectral = head_grid(found.table, "spectral_entropy")
    correlation = head_grid(found.table, "entropy_correlation")
    return Section(
        "entropies",
        "Entropies",
        (
            "The positional entropy of a row says over how many keys attention is spread: its exponential is the "
            "number of keys that an even row with the same entropy would have. The spectral entropy says the same of "
            "the frequencies of the row. Both are in nats. Shuffling the weights of a row keeps the first by "
            "construction.",
            _summary(positional),
            "The two tend to go in opposite directions in any signal: one peak has all frequencies, an even row has "
            "one. So a negative correlation of the two over the rows of a head says little by itself; shuffled rows "
            f"have it as well: their mean is {number(mean(correlation.nulls['shuffled']))}, that of the model "
            f"{number(correlation.mean())}.",
            explained(correlation, "the correlation"),
        ),
        (
            Figure(
                "Entropy over positions and over frequencies",
                (
                    _scatter(positional, spectral),
                    head_map(
                        "entropy-map", positional.values, found.subject.heads, title="positional entropy", unit="nats"
                    ),
                ),
                "In the first plot each head is a dot, coloured by its layer, at the means of its two entropies; null "
                "models are small marks for the same heads. Heads that lie among the marks of a null model are "
                "explained by it. In the map dark cells are heads that look at few keys.",
            ),
            Figure(
                "Correlation of the two entropies over the rows of a head",
                (
                    head_map(
                        "correlation-map",
                        correlation.values,
                        found.subject.heads,
                        title="correlation of entropies",
                        unit="Pearson's correlation",
                        limits=(-1.0, 1.0),
                    ),
                    by_layer(
                        "correlation-layers",
                        correlation,
                        title="correlation of entropies",
                        unit="Pearson's correlation",
                        limits=(-1.05, 1.05),
                    ),
                ),
                "\N{MINUS SIGN}1: rows that are spread over more keys have fewer frequencies, without exception; 0: "
                "the two are unrelated. Uniform rows have no correlation where all rows are alike, and no line then.",
            ),
        ),
    )


def _summary(positional: HeadGrid) -> str:
    known = positional.values[np.isfinite(positional.values)]
    uniform = mean(positional.nulls["uniform"])
    if not known.size:
        return "It is not defined here."
    low, middle, high = (number(float(np.exp(x))) for x in (known.min(), np.median(known), known.max()))
    return (
        f"Heads spread their attention over {low} to {high} keys in this sense, half of them over less than {middle}; "
        f"uniform attention is spread over {number(float(np.exp(uniform)))}."
    )


def _scatter(positional: HeadGrid, spectral: HeadGrid) -> Picture:
    layers = steps(positional.values.shape[0]).repeat(positional.values.shape[1])
    alt = "Positional against spectral entropy of all heads, coloured by layer, and of null models"
    with drawing("entropy-scatter", alt, (4.5, 3.6)) as drawn:
        axes = drawn.figure.subplots()
        colors = layer_colors(positional.values.shape[0])
        is_large = positional.values.size > MOST_DOTS
        for name in positional.nulls:
            style = NULLS[name]
            axes.scatter(
                positional.nulls[name],
                spectral.nulls[name],
                s=10,
                marker=style.marker,
                color=style.color,
                alpha=0.7,
                linewidths=0,
                rasterized=is_large,
                label=style.label,
            )
        axes.scatter(
            positional.values,
            spectral.values,
            color=colors.to_rgba(layers),
            s=22,
            linewidths=0,
            rasterized=is_large,
            label="model: a head",
        )
        axes.set(title="entropies of heads", xlabel="positional entropy, nats", ylabel="spectral entropy, nats")
        drawn.figure.colorbar(colors, ax=axes, label="layer").outline.set_visible(False)
        axes.grid(True)
        legend_below(axes, 3)
    return drawn.picture
