"""Sentences that several sections have."""

from __future__ import annotations

from collections.abc import Collection

from ....config import SETTINGS, MRAConfig
from ..head_grid import HeadGrid
from ..palette import NULLS
from ..plots import number


def null_name(name: str) -> str:
    """Return what the page calls a null model."""
    return NULLS[name].label.removeprefix("null: ")


def explained(grid: HeadGrid, what: str) -> str:
    """Say how much of a metric the nearest null model explains."""
    nearest = grid.nearest_null()
    if nearest is None:
        return f"No null model is defined for {what} here."
    name, away, apart, span = nearest
    return (
        f"For {what}, the null model “{null_name(name)}” comes nearest: on average a head is {number(away)} away from "
        f"it, and {number(apart)} from the mean of all heads; the null models are up to {number(span)} from each "
        f"other. So it explains {nearest.explains} of what is seen."
    )


def difference(config: MRAConfig, candidates: Collection[MRAConfig]) -> str:
    """Return the settings that tell a candidate from the others, for a label; nothing if it is the only one."""
    told = [name for name in SETTINGS if len({getattr(each, name) for each in candidates}) > 1]
    return "".join(f", {name}={getattr(config, name)}" for name in told)
