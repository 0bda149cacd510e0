"""Local against global heads."""

from __future__ import annotations

from ..document import Figure, Section
from ..findings import Findings
from ..head_grid import head_grid
from ..plots import by_layer, head_map, share
from .words import explained


def locality(found: Findings) -> Section:
    """Return the section."""
    grid = head_grid(found.table, "local_share")
    uniform = grid.nulls["uniform"]
    local = int((grid.values > 0.5).sum())
    return Section(
        "locality",
        "Local and global heads",
        (
            "The local share of a head is the share of its attention that goes to keys less than 32 tokens away from "
            "the query. In a short text, or at the beginning of a causal one, few keys are farther away, so compare "
            "it with uniform attention.",
            f"{local} of {int((grid.values >= 0.0).sum())} heads pay more than half of their attention to near keys. "
            f"The mean over heads is {share(grid.mean())}; uniform attention would have "
            f"{share(float(uniform[uniform >= 0].mean()))}.",
            explained(grid, "the local share"),
        ),
        (
            Figure(
                "Local share by layer and head",
                (
                    head_map(
                        "local-map",
                        grid.values,
                        found.subject.heads,
                        title="local share",
                        unit="share of attention",
                        limits=(0.0, 1.0),
                    ),
                    by_layer("local-layers", grid, title="local share", unit="share of attention", limits=(0.0, 1.02)),
                ),
                "In the map bright cells are local heads, dark ones global; the plot has the same heads by layer. A "
                "head near the line “distance alone” may look nearby whatever the text says; one near “uniform” or "
                "“shuffled” takes no notice of the distance.",
            ),
        ),
    )
