"""Colours and line styles, the same in all figures. Colours are those of Okabe and Ito, for the colour-blind."""

from __future__ import annotations

from typing import NamedTuple

BLUE, GREEN, ORANGE, VERMILION, PURPLE = "#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7"

OBSERVED = BLUE
"""The model itself; on a dark page the sky blue takes its place."""

COLOR_MAP = "viridis"


class Style(NamedTuple):
    """How a model is drawn, and what it is called in a legend."""

    label: str
    color: str
    line: str | tuple[int, tuple[int, ...]]
    marker: str


NULLS = {
    "uniform": Style("null: uniform", "#8C8C8C", ":", "s"),
    "random": Style("null: random", PURPLE, "--", "^"),
    "shuffled": Style("null: shuffled", GREEN, "-.", "D"),
    "alibi": Style("null: distance alone", ORANGE, (0, (5, 1, 1, 1, 1, 1)), "v"),
}
"""By the names that `analyze` has."""
