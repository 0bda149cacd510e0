"""Shares of the power in bands of frequency."""

from __future__ import annotations

from ..document import Figure, Section
from ..findings import Findings
from ..head_grid import HeadGrid, head_grid
from ..plots import by_layer, head_map, share
from .words import explained

_BANDS = (
    ("low", "low: longer than 8 tokens"),
    ("mid", "mid: 8 to 2.7 tokens"),
    ("high", "high: shorter than 2.7 tokens"),
)


def bands(found: Findings) -> Section:
    """Return the section."""
    grids = {name: head_grid(found.table, f"{name}_share") for name, _ in _BANDS}
    pictures = [
        picture
        for name, title in _BANDS
        for picture in (
            head_map(f"{name}-map", grids[name].values, found.subject.heads, title=title, unit="share of power"),
            by_layer(f"{name}-layers", grids[name], title=title, unit="share of power"),
        )
    ]
    return Section(
        "bands",
        "Bands of frequency",
        (
            "A row of attention is a signal over the positions of the keys. Its power spectrum says how fast weights "
            "change along the text: low frequencies are broad hills, high ones are single tokens. The bands are those "
            "up to 1/8, 1/8 to 3/8 and above 3/8 of a cycle per token; the frequency 0, the mean, is in the low one, "
            "and a Hann window was applied.",
            _summary(grids),
            explained(grids["low"], "the share of low frequencies"),
        ),
        (
            Figure(
                "Shares of power by layer and head",
                pictures,
                "In a map every head is a cell, and a bright one has much of its power in the band; the plot after it "
                "has the same heads by layer, beside null models. A row with one peak has a flat spectrum, a quarter "
                "of which is in the low band, half in the middle and a quarter in the high one; a uniform row has all "
                "its power in the low band.",
            ),
        ),
    )


def _summary(grids: dict[str, HeadGrid]) -> str:
    means = [f"{share(grid.mean())} in the {name} band" for name, grid in grids.items()]
    return f"On average a head has {means[0]}, {means[1]} and {means[2]}."
