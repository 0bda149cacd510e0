"""Plots that several sections have: a map of all heads, and heads by layer beside null models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .._arrays import Floats, steps
from .._extra import require
from .document import Picture
from .drawing import drawing
from .head_grid import HeadGrid, layer_means
from .palette import COLOR_MAP, NULLS, OBSERVED

MOST_TICKS = 12

MOST_DOTS = 1000
"""More dots than these are drawn as pixels, which take less room on the page."""


def head_map(
    key: str,
    values: Floats,
    heads: Sequence[int],
    *,
    title: str,
    unit: str,
    limits: tuple[float | None, float | None] = (None, None),
    text: Sequence[Sequence[str]] | None = None,
) -> Picture:
    """Draw a number of every head as a colour, layers by heads; `text` is written into the cells."""
    layers, columns = values.shape
    alt = f"Map of {title}: {layers} layers by {columns} heads, {spread(values)}"
    height = min(3.6, 1.3 + 0.22 * layers)
    with drawing(key, alt, (4.5, height)) as drawn:
        axes = drawn.figure.subplots()
        # Rows of pixels are layers, from the bottom as the model computes.
        image = axes.imshow(values, cmap=COLOR_MAP, vmin=limits[0], vmax=limits[1], origin="lower", aspect="auto")
        axes.set(title=title, xlabel="head", ylabel="layer")
        axes.spines[:].set_visible(False)
        number_ticks(axes.xaxis, list(heads))
        number_ticks(axes.yaxis, list(range(layers)))
        drawn.figure.colorbar(image, ax=axes, label=unit).outline.set_visible(False)
        for row, cells in enumerate(text or ()):
            for column, cell in enumerate(cells):
                share = float(image.norm(values[row, column]))
                color = "#000000" if share > 0.55 else "#ffffff"
                axes.text(column, row, cell, ha="center", va="center", fontsize=6.5, color=color)
    return drawn.picture


def by_layer(
    key: str, grid: HeadGrid, *, title: str, unit: str, limits: tuple[float | None, float | None] = (None, None)
) -> Picture:
    """Draw every head as a dot over its layer, the means of the layers, and those of the null models."""
    layers = steps(grid.values.shape[0])
    alt = f"{title} by layer, {spread(grid.values)}; null models: " + ", ".join(
        f"{NULLS[name].label.removeprefix('null: ')} {number(float(np.mean(known)))}"
        for name, null in grid.nulls.items()
        if (known := null[np.isfinite(null)]).size
    )
    with drawing(key, alt) as drawn:
        axes = drawn.figure.subplots()
        dots = {"color": OBSERVED, "alpha": 0.45, "markersize": 3, "markeredgewidth": 0}
        for head in range(grid.values.shape[1]):
            axes.plot(layers, grid.values[:, head], "o", **dots, rasterized=grid.values.size > MOST_DOTS)
        axes.plot(layers, layer_means(grid.values), color=OBSERVED, marker="o", label="model: mean, and its heads")
        draw_nulls(axes, layers, {name: layer_means(null) for name, null in grid.nulls.items()})
        axes.set(title=title, xlabel="layer", ylabel=unit, ylim=limits)
        number_ticks(axes.xaxis, [*range(len(layers))])
        axes.grid(True)
        legend_below(axes)
    return drawn.picture


def draw_nulls(axes: Any, x: Floats, nulls: dict[str, Floats]) -> None:
    """Draw a line for each null model that is defined somewhere."""
    for name, values in nulls.items():
        if np.isfinite(values).any():
            style = NULLS[name]
            axes.plot(
                x,
                values,
                color=style.color,
                linestyle=style.line,
                marker=style.marker,
                markersize=2.5,
                label=style.label,
            )


def decades(bar: Any) -> None:
    """Label a colour bar of logarithms to the base of ten with the numbers themselves."""
    low, high = bar.vmin, bar.vmax
    ticks = [*range(math.ceil(low), math.floor(high) + 1)]
    bar.set_ticks(ticks, labels=[f"{10.0**tick:g}" for tick in ticks])


def layer_colors(count: int) -> Any:
    """Return what gives layers their colours; the ends of the map, which a dark or a light page hides, are left out."""
    require("matplotlib.cm", "matplotlib", "a report")
    matplotlib = require("matplotlib", "matplotlib", "a report")
    inner = matplotlib.colors.ListedColormap(matplotlib.colormaps[COLOR_MAP](np.linspace(0.3, 0.85, 256)))
    return matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, max(count - 1, 1)), inner)


def legend_below(axes: Any, columns: int = 2, **more: Any) -> None:
    """Put the legend below the axes, where it hides no data."""
    axes.figure.legend(loc="outside lower center", ncols=columns, **more)


def number_ticks(axis: Any, labels: Sequence[int]) -> None:
    """Label the places 0, 1, ... of an axis with numbers, at most a dozen of them."""
    step = -(-len(labels) // MOST_TICKS)
    places = range(0, len(labels), step)
    axis.set_ticks([*places], [str(labels[i]) for i in places])
    axis.set_tick_params(length=0)


def write_ticks(axis: Any, write: Callable[[float], str]) -> None:
    """Label the values of an axis, and nothing between them."""

    def label(value: float, _: int | None) -> str:
        return write(value)

    def nothing(*_: object) -> str:
        return ""

    axis.set_major_formatter(label)
    axis.set_minor_formatter(nothing)


def percent(axis: Any) -> None:
    """Label an axis of shares in percent."""
    write_ticks(axis, lambda value: f"{100.0 * value:.3g} %")


def logarithmic_percent(axis: Any) -> None:
    """Label a logarithmic axis of shares in percent, with three labels in each factor of ten."""
    ticker = require("matplotlib.ticker", "matplotlib", "a report")
    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0), numticks=30))
    axis.set_minor_locator(ticker.NullLocator())
    percent(axis)


def number(value: float) -> str:
    """Write a number for readers: three digits."""
    if not math.isfinite(value):
        return "not defined" if math.isnan(value) else "infinite"
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def share(value: float) -> str:
    """Write a share in percent."""
    if not math.isfinite(value):
        return number(value)
    if 0.0 < abs(value) < 1e-4:
        return "less than 0.01\N{NO-BREAK SPACE}%"
    return f"{100.0 * value:.{3 if abs(value) >= 0.9995 else 2}g}\N{NO-BREAK SPACE}%".replace("-", "\N{MINUS SIGN}")


def spread(values: Floats) -> str:
    """Say from where to where values lie."""
    known = values[np.isfinite(values)]
    return f"from {number(float(known.min()))} to {number(float(known.max()))}" if known.size else "nowhere defined"
