"""Figures of matplotlib as SVG inside a page, which follow its light or dark colours."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from .._extra import require
from .document import Picture
from .palette import OBSERVED

_INK = "#012345"
"""Stands for the colour of the page's text, which matplotlib has no word for; nothing else is drawn in it."""

_POINTS_PER_REM = 11.0
"""At this scale the 8 points of the labels are a little smaller than the text of the page."""

_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # labels are text, whatever is in them
    "font.family": "sans-serif",
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "savefig.dpi": 200.0,  # of what is drawn as pixels
    "legend.framealpha": 0.0,
    "legend.edgecolor": "none",
    "legend.fontsize": 7.0,
    "axes.grid": False,
    "grid.alpha": 0.18,
    "grid.linewidth": 0.6,
    "image.interpolation": "none",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.0,
}


class Drawing:
    """A figure of matplotlib that is being drawn; `picture` is there when the `with` block of `drawing` has ended."""

    def __init__(self, figure: Any) -> None:
        self.figure = figure
        self.picture = Picture("", "", 0.0)


@contextmanager
def drawing(key: str, alt: str, size: tuple[float, float] = (4.5, 3.2)) -> Generator[Drawing]:
    """Draw a figure.

    Parameters
    ----------
    key : str
        Letters, digits and hyphens; another one for every picture of a page.
    alt : str
        What the picture shows, in words.
    size : tuple of float
        Width and height in inches.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    style, figure = (require(f"matplotlib.{name}", "matplotlib", "a report") for name in ("style", "figure"))
    # From the defaults, so that no matplotlibrc changes the page.
    with style.context(["default", _STYLE | {"svg.hashsalt": key}]):
        drawn = Drawing(figure.Figure(figsize=size, layout="constrained"))
        yield drawn
        file = io.StringIO()
        drawn.figure.savefig(file, format="svg", metadata={"Date": None})
    drawn.picture = Picture(_inline(file.getvalue(), key, alt), alt, size[0] * 72.0 / _POINTS_PER_REM)


def _inline(svg: str, key: str, alt: str) -> str:
    """Return an SVG file as an element of HTML, with ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None
    head = f'<svg class="plot" role="img" aria-label="{html.escape(alt)}" viewBox="{box[1]}">'
    svg = head + svg[svg.index(">") + 1 :].replace("xlink:href", "href").replace(_INK, "currentColor")
    svg = svg.replace(OBSERVED.lower(), "var(--observed)")
    svg = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{key}-", svg)
    return re.sub(r"\s*\n\s*", "\n", svg).strip()
